"""Train the demo checkpoint: a tiny Stable Diffusion on endless, freshly drawn pictures.

    python -m demo.train init --bpe bpe_simple_vocab_16e6.txt.gz
    python -m demo.train vae --minutes 4
    python -m demo.train diffusion --minutes 18 --compile
    python -m demo.train decoder --minutes 2
    python -m demo.train student --teacher OTHER_CHECKPOINT/vae --minutes 3

Each stage starts from the weights in `--checkpoint` and writes its own back, every two minutes (in
a short stage every third of it) and at its end, so a stage that was cut short goes on from there
(the optimiser starts anew).
Pictures are drawn on the training device (`shapes.py`); worker processes make up scenes and
captions (`captions.py`). Nothing is stored.
"""

import argparse
import copy
import math
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import CLIPTextModel, CLIPTokenizer

from demo import networks
from demo.captions import training_example, training_words
from demo.shapes import draw, pack

# Height and width, and how often, by `--mix`. `small` learns fast: mostly the native size, a good
# part 128, some of all else. `even` makes the large sizes as good afterwards.
DIFFUSION_SIZES = {
    "small": {
        (256, 256): 54,
        (128, 128): 32,
        (256, 384): 2,
        (384, 256): 2,
        (256, 512): 2,
        (512, 256): 2,
        (192, 192): 2,
        (384, 384): 2,
        (512, 512): 2,
    },
    "even": {
        (256, 256): 28,
        (128, 128): 16,
        (192, 192): 3,
        (256, 384): 4,
        (384, 256): 4,
        (256, 512): 4,
        (512, 256): 4,
        (384, 384): 10,
        (384, 512): 4,
        (512, 384): 4,
        (512, 512): 19,
    },
}
VAE_SIZES = {(128, 128): 50, (256, 256): 40, (384, 256): 5, (512, 512): 5}
STUDENT_SIZES = {
    (128, 128): 30,
    (192, 192): 5,
    (256, 256): 40,
    (256, 384): 4,
    (384, 256): 4,
    (512, 512): 17,
}
COMPILED_SIZES = {(256, 256), (128, 128)}


class Captions(IterableDataset):
    """Endless batches of packed scenes [N, 11] and caption ids [N, 77]; some captions are empty."""

    def __init__(self, tokenizer_folder, count, seed, dropout=0.1):
        self.tokenizer_folder, self.count = tokenizer_folder, count
        self.seed, self.dropout = seed, dropout

    def __iter__(self):
        info = get_worker_info()
        rng = random.Random(f"{self.seed} {info.id if info else 0}")
        tokenizer = CLIPTokenizer.from_pretrained(self.tokenizer_folder)
        pieces = {}
        while True:
            scenes, rows = [], []
            for _ in range(self.count):
                scene, text = training_example(rng)
                text = "" if rng.random() < self.dropout else training_words(text, rng)
                ids = [networks.BOS]
                for word in text.split():
                    if word not in pieces:
                        pieces[word] = tokenizer(word, add_special_tokens=False)["input_ids"]
                    # Words that mean nothing here, so that a stranger's prompt does no harm.
                    if rng.random() < 0.006:
                        ids.append(rng.randrange(networks.BOS))
                    ids += pieces[word]
                rows.append(ids + [networks.EOS] * (networks.TOKENS - len(ids)))
                scenes.append(scene)
            yield pack(scenes), torch.tensor(rows)

    def known_ids(self, samples=30000):
        """The ids that captions use; only their rows of the word table are trained."""
        dataset = Captions(self.tokenizer_folder, samples, self.seed, dropout=0)
        rng, words = random.Random(self.seed), set()
        for _ in range(samples):
            words.update(training_words(training_example(rng)[1], rng).split())
        tokenizer = CLIPTokenizer.from_pretrained(dataset.tokenizer_folder)
        ids = {i for word in words for i in tokenizer(word, add_special_tokens=False)["input_ids"]}
        return sorted(ids | {networks.BOS, networks.EOS})


class Trainer:
    """Optimiser, moving average, learning rate over wall-clock time, and saving."""

    def __init__(self, modules, peak, minutes, save, ema=0.9995):
        self.modules, self.peak, self.save, self.ema = modules, peak, save, ema
        self.parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        is_cuda = self.parameters[0].is_cuda
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.0, fused=is_cuda
        )
        self.start, self.seconds, self.steps = time.monotonic(), minutes * 60, 0
        self.saved_at, self.logged_at, self.loss = self.start, self.start, None
        self.save_every = min(120, self.seconds / 3)

    def is_done(self):
        return time.monotonic() - self.start > self.seconds

    def update(self, loss):
        progress = min((time.monotonic() - self.start) / self.seconds, 1.0)
        warm = min(1.0, (self.steps + 1) / 300)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * warm * 0.5 * (1 + math.cos(math.pi * progress)) + 1e-7
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        decay = min(self.ema, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        loss = loss.detach()
        self.loss = loss if self.loss is None else torch.lerp(self.loss, loss, 0.02)
        now = time.monotonic()
        if now - self.logged_at > 10:
            self.logged_at = now
            print(
                f"{now - self.start:6.0f} s  step {self.steps:6d}  loss {self.loss:.5f}", flush=True
            )
        if now - self.saved_at > self.save_every:
            self.saved_at = now
            self.save(*self.averaged())

    def averaged(self):
        """Copies of the modules with the averaged weights."""
        average = iter(self.average)
        copies = [copy.deepcopy(module) for module in self.modules]
        with torch.no_grad():
            for parameter in (p for m in copies for p in m.parameters() if p.requires_grad):
                parameter.copy_(next(average))
        return copies


def train_vae(args):
    """Autoencoder: L1 on pixels and on their differences, and a light pull to a unit normal.

    The stage `decoder` leaves the encoder as it is, and so the latents that a UNet has learned.
    """
    is_whole = args.stage == "vae"
    checkpoint, device = Path(args.checkpoint), torch.device(args.device)
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32).to(device)
    if not is_whole:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    data = iter(_loader(args, dropout=1.0))
    rng = random.Random(args.seed)

    def save(average):
        if is_whole:
            average.register_to_config(scaling_factor=measure_scaling_factor(average, data, device))
        networks.save_checkpoint(checkpoint, vae=average)
        print("scaling factor", average.config.scaling_factor, flush=True)

    def losses(pictures):
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        divergence = (posterior.mean.float().square() + posterior.var.float() - 1).mean()
        divergence = (divergence - posterior.logvar.float().mean()) / 2
        return _pixel_loss(decoded, pictures) + 3e-5 * divergence

    trainer = Trainer([vae], args.lr, args.minutes, save, ema=0.998)
    while not trainer.is_done():
        height, width = _choose(VAE_SIZES, rng)
        packed, _ = next(data)
        count = max(1, args.batch // 8 * 65536 // (height * width))
        trainer.update(losses(draw(packed[:count], height, width, device)))
    save(*trainer.averaged())


def train_student(args):
    """An autoencoder of `networks.make_vae`'s size with the latents of the one in `--teacher`.

    A UNet trained in the teacher's latents stays as it is. The encoder learns those latents, the
    decoder learns to see pictures in them, and in a few of its own encoder's.
    """
    checkpoint, device = Path(args.checkpoint), torch.device(args.device)
    teacher = AutoencoderKL.from_pretrained(args.teacher, torch_dtype=torch.float32)
    student = make_student(teacher, checkpoint / "vae")
    teacher.requires_grad_(False).to(device, memory_format=torch.channels_last)
    student.to(device, memory_format=torch.channels_last)
    scaling_factor = teacher.config.scaling_factor
    data, rng = iter(_loader(args, dropout=1.0)), random.Random(args.seed)

    def save(average):
        networks.save_checkpoint(checkpoint, vae=average)

    def losses(pictures):
        def chance():
            return torch.rand(len(pictures), 1, 1, 1, device=device)

        # Some colours and edges that no scene has, for the encoder alone: the decoder should not
        # learn to draw them.
        is_plain = chance() > 0.15
        seen = torch.where(is_plain, pictures, torch.lerp(pictures, pictures.flip(0), chance()))
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                wanted = teacher.encode(seen).latent_dist
            own = student.encode(seen).latent_dist
            # Half of the latents as a UNet is trained on them; the others are less exact, as its
            # samples are.
            spread = wanted.std + 0.08 * chance() / scaling_factor
            latents = wanted.mean + spread * (chance() < 0.5) * torch.randn_like(spread)
            latents = torch.where(chance() < 0.15, own.mean, latents)
            decoded = student.decode(latents).sample.float()
        missed = (own.mean.float() - wanted.mean.float()).abs().mean() * scaling_factor
        missed = missed + 0.02 * (own.logvar.float() - wanted.logvar.float()).abs().mean()
        return _pixel_loss(decoded * is_plain, pictures * is_plain) + 0.3 * missed

    def pictures(height, width):
        count = max(1, args.batch // 8 * 65536 // (height * width))
        drawn = draw(next(data)[0][:count], height, width, device)
        return drawn.contiguous(memory_format=torch.channels_last)

    run_compiled = losses
    if args.compile:
        run_compiled = torch.compile(losses, dynamic=False)
        for size in COMPILED_SIZES:  # Before the clock starts: the rate falls by it.
            run_compiled(pictures(*size)).backward()
        student.zero_grad(set_to_none=True)
    trainer = Trainer([student], args.lr, args.minutes, save, ema=0.998)
    while not trainer.is_done():
        size = _choose(STUDENT_SIZES, rng)
        run = run_compiled if size in COMPILED_SIZES else losses
        trainer.update(run(pictures(*size)))
    save(*trainer.averaged())


@torch.no_grad()
def make_student(teacher, folder):
    """The autoencoder in `folder` if it is of the student's size already, else a new one.

    What is as large in the teacher starts from there: most of the layers at 1/8 of the size.
    """
    config = AutoencoderKL.load_config(folder)
    if tuple(config["block_out_channels"]) == networks.VAE_CHANNELS:
        return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    student = networks.make_vae()
    student.register_to_config(scaling_factor=teacher.config.scaling_factor)
    weights, known = student.state_dict(), teacher.state_dict()
    for name, weight in weights.items():
        if name in known and known[name].shape == weight.shape:
            weight.copy_(known[name])
    return student


def train_diffusion(args):
    """Text encoder and UNet together, predicting the noise in the autoencoder's latents."""
    checkpoint, device = Path(args.checkpoint), torch.device(args.device)
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32).to(device)
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32)
    unet, text_encoder = unet.to(device).train(), text_encoder.to(device).train()
    vae.requires_grad_(False)
    scaling_factor = vae.config.scaling_factor
    loader = _loader(args, dropout=0.1)
    rng, data = random.Random(args.seed), iter(loader)

    known = torch.zeros(networks.EOS + 1, 1, device=device)
    known[loader.dataset.known_ids()] = 1
    text_encoder.get_input_embeddings().weight.register_hook(lambda grad: grad * known)

    alphas = networks.make_scheduler().alphas_cumprod.to(device)
    sigmas = ((1 - alphas) / alphas).sqrt()

    def save(text_average, unet_average):
        networks.save_checkpoint(checkpoint, text_encoder=text_average, unet=unet_average)

    def encode(pictures):
        with torch.autocast(device.type, torch.bfloat16):
            return vae.encode(pictures).latent_dist.mean.float()

    def losses(latents, ids, timesteps, noise, repeats):
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16):
            prompt_embeds = text_encoder(ids).last_hidden_state.repeat(repeats, 1, 1)
            noise_pred = unet(noisy, timesteps, prompt_embeds).sample.float()
        # A noise error counts in the picture times sigma, so that the plain loss neglects the
        # first steps, which settle colours and layout (arXiv:2310.08442 weighs by sigma too).
        weight = sigmas[timesteps].clamp(0.3, 10)
        return ((noise_pred - noise).square().mean((1, 2, 3)) * weight).mean() / 2

    run_compiled = torch.compile(losses, dynamic=False) if args.compile else losses
    encode_compiled = torch.compile(encode, dynamic=False) if args.compile else encode
    trainer = Trainer([text_encoder, unet], args.lr, args.minutes, save)
    while not trainer.is_done():
        height, width = _choose(DIFFUSION_SIZES[args.mix], rng)
        is_compiled = (height, width) in COMPILED_SIZES
        packed, ids = next(data)
        count = args.batch
        if not is_compiled:
            count = max(1, min(count, count * 32768 // (height * width)))
        packed, ids = packed[:count], ids[:count].to(device, non_blocking=True)
        with torch.no_grad():
            pictures = draw(packed, height, width, device)
            latents = (encode_compiled if is_compiled else encode)(pictures) * scaling_factor
        # One drawing serves several noise levels: encoding costs as much as denoising.
        repeats = 4 if height * width <= 128 * 128 else 2
        latents = latents.repeat(repeats, 1, 1, 1)
        rows = len(latents)
        # Every sixth row at the noisiest levels: from pure noise the background must come right.
        timesteps = torch.randint(0, 1000, (rows,), device=device)
        timesteps[: rows // 6] = torch.randint(850, 1000, (rows // 6,), device=device)
        run = run_compiled if is_compiled else losses
        trainer.update(run(latents, ids, timesteps, torch.randn_like(latents), repeats))
    save(*trainer.averaged())


@torch.no_grad()
def measure_scaling_factor(vae, data, device):
    """One over the standard deviation of the latents of native-size pictures."""
    vae = copy.deepcopy(vae).half().float()
    packed = next(data)[0][:64]
    latents = [
        vae.encode(draw(packed[i : i + 8], 256, 256, device)).latent_dist.mean
        for i in range(0, len(packed), 8)
    ]
    return round(1 / torch.cat(latents).std().item(), 5)


def _pixel_loss(decoded, pictures):
    error = decoded - pictures
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 0.5 * edges


def _choose(sizes, rng):
    return rng.choices(list(sizes), list(sizes.values()))[0]


def _loader(args, dropout):
    dataset = Captions(Path(args.checkpoint) / "tokenizer", args.batch, args.seed, dropout)
    options = {"prefetch_factor": 8, "persistent_workers": True} if args.workers else {}
    return DataLoader(dataset, batch_size=None, num_workers=args.workers, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("init", "vae", "decoder", "diffusion", "student"))
    parser.add_argument("--checkpoint", default="demo/checkpoint", help="read and written")
    parser.add_argument("--teacher", help="another checkpoint's vae folder, for student")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=128, help="pictures a step at 256x256")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak, falls to 0 by a cosine")
    parser.add_argument("--mix", choices=DIFFUSION_SIZES, default="small", help="of sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the common sizes")
    parser.add_argument("--bpe", help="OpenAI CLIP's bpe_simple_vocab_16e6.txt.gz, for init")
    args = parser.parse_args()
    own_vae = Path(args.checkpoint, "vae").resolve()
    if args.stage == "student" and (not args.teacher or Path(args.teacher).resolve() == own_vae):
        parser.error("student takes a --teacher, a folder other than the vae that it writes")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if args.stage == "init":
        if args.bpe:
            networks.write_tokenizer(args.bpe, Path(args.checkpoint) / "tokenizer")
        networks.save_checkpoint(
            args.checkpoint, networks.make_text_encoder(), networks.make_unet(), networks.make_vae()
        )
    elif args.stage in ("vae", "decoder"):
        train_vae(args)
    elif args.stage == "student":
        train_student(args)
    else:
        train_diffusion(args)


if __name__ == "__main__":
    main()
