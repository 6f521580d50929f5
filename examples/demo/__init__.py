"""The demo: a small pretrained model learns single-digit addition."""
