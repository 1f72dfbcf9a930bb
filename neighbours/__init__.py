"""Related methods that HELLoRA is compared with: DR-LoRA."""
