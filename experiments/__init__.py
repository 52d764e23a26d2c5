"""The paper's tables and figures, one command each; see README.md."""
