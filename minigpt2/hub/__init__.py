"""What lies elsewhere: models and data of the Hugging Face Hub."""
