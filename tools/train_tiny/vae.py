"""Stage 1: the autoencoder, an ``AutoencoderTiny`` with 12 channels at half resolution.

The latent has as many numbers as the image, so that the reconstruction can be nearly exact: at 32x32, what an autoencoder
loses is what tells a cat from a dog. Noise on the latent while training keeps the decoder calm under small errors.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny
from torch.nn import functional as F

from common import Stage, coin, flip_some, parser, to_float
from data import load_split

CONFIG = {
    "latent_channels": 12,
    "encoder_block_out_channels": (48, 48),
    "decoder_block_out_channels": (48, 48),
    "num_encoder_blocks": (0, 2),
    "num_decoder_blocks": (2, 0),
    "upsampling_scaling_factor": 2,
    "scaling_factor": 1.0,
}


def main() -> None:
    p = parser(__doc__.splitlines()[0], steps=5000, lr=2e-3, decay=0.6, batch_size=32)
    p.add_argument("--noise", type=float, default=0.05, help="noise on the latent, in units of its standard deviation")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = load_split(args.data, "pretrain").images
    count = min(1000, len(data) // 10)
    train, held_out = data[:-count], to_float(data[-count:])
    vae = AutoencoderTiny(**CONFIG).to(memory_format=torch.channels_last)

    def loss(step: int, g: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        images = train[torch.randint(len(train), (args.batch_size,), generator=g)]
        x = to_float(flip_some(images, coin(args.batch_size, g)))
        latents = vae.encode(x).latents
        std = latents.std()
        noisy = latents + args.noise * std.detach() * torch.randn(latents.shape, generator=g)
        mse = F.mse_loss(vae.decode(noisy).sample, x)
        # The decoder squashes beyond +-3: keep the latents' spread near 1 and their mean near 0.
        scale = (std - 1) ** 2 + latents.mean() ** 2
        return mse + 1e-3 * scale, {"mse": mse.item(), "std": std.item()}

    def evaluate() -> dict[str, float]:
        out = torch.cat([vae.decode(vae.encode(b).latents).sample for b in held_out.split(100)])
        error = ((out.clamp(-1, 1) - held_out) / 2).pow(2).mean((1, 2, 3))
        return {"psnr": (-10 * error.log10()).mean().item()}

    optimizer = torch.optim.AdamW(vae.parameters(), args.lr, weight_decay=0.0, betas=(0.9, 0.99))
    Stage("vae", {"vae": vae}, loss, optimizer, evaluate=evaluate, evaluate_every=500).run(args)


if __name__ == "__main__":
    main()
