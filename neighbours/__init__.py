"""What HELLoRA is compared with: DoRA, DR-LoRA with experts of different ranks, other policies."""
