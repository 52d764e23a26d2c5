"""The U-Net of Ho et al., its convolution, and what a network costs."""
