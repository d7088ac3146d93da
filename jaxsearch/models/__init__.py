"""The decoder, the attentions handed into it, pretrained weights in and out, and generation."""
