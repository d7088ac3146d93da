"""What differs between training stages: which modules train, what a batch is, the masked loss, the evaluation."""
