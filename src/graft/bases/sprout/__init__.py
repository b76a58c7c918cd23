"""sprout: a small vision transformer for grey images of 8 x 8 pixels, pre-trained on handwritten digits.

A ViT of transformers (An Image is Worth 16x16 Words, Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929) of
width 96, 5 layers, 4 heads, on 16 patches of 2 x 2 pixels and a class token:

    h = class token after the last norm of the encoder          [batch, 96]

It takes images of any size and colours, which its image processor and Graft turn into what it was trained on. The
recipe is `bases/sprout.py` in the repository; the card says what it learnt from and what a linear classifier of h gets.
"""
