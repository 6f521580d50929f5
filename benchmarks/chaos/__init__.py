"""Chaos: real runs under seeded kills, freezes, cut connections and a lost queue tail (docs/chaos.md)."""
