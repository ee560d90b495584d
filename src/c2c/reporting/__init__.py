"""Drawing for the pictures of analysis and demo."""
