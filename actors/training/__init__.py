"""Fine-tuning: what is trained, the loss, the teacher, and the loop."""
