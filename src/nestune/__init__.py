"""Fine-tune LoRA adapters on new data without losing what the model knew."""
