"""The commands of `diffusers-ext`, one family a file: each adds its options to the parser and says what runs."""
