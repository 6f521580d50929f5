"""Tasks that launched services learn: `penstock launch local` with SGLang, a queue, rewards and a trainer."""
