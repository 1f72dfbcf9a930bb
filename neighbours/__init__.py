"""Methods near HELLoRA that it is compared with: DR-LoRA."""
