"""The `diffusion` backend: one file that serves every one-shot stage.

A model of this backend is a config.pbtxt, a `stage.json` that names the stage, and weights. Each
stage is a pure function from named tensors to named tensors.
"""

from fullpipe import triton_adapter as triton
from fullpipe.config import StageConfig
from fullpipe.errors import SetupError


class TritonPythonModel:
    """Translates between Triton and the stages of `fullpipe`."""

    def initialize(self, args):
        """Load the stage that `stage.json` names."""
        triton.log_to_triton(args["model_name"])
        folder = triton.version_folder(args)
        try:
            config = StageConfig.load(folder / "stage.json")
            if config.stage not in STAGES:
                raise SetupError(
                    f"{folder / 'stage.json'}: stage {config.stage!r} is unknown,"
                    f" allowed: {', '.join(STAGES)}"
                )
            self._stage = STAGES[config.stage](folder, config)
            # Ensembles call the picture encoder, and no word travels along with theirs.
            self._is_open = config.stage == "image_encoder"
        except SetupError as error:
            raise triton.abort_loading(error) from error

    def execute(self, requests):
        """Answer each request by itself."""
        return triton.run_stage(requests, self._stage, self._is_open)


def text_encoder(folder, config):
    """prompt, negative_prompt, clip_skip → the four tensors of `PromptEncoder.encode`."""
    dtype = stage_dtype(config)
    import torch

    from fullpipe import __version__
    from fullpipe.cache_embeddings import cached
    from fullpipe.text import PromptEncoder

    execute = None
    if config.engine != "torch":
        from fullpipe.engines.loading import load_clip

        pipeline = pipeline_config(folder)

        def execute(part, model):
            return load_clip(part, model, pipeline, config.device)

    embeddings = folder / "embeddings"
    encoder = PromptEncoder.from_folder(
        folder,
        device=config.device,
        dtype=dtype,
        embeddings_folder=embeddings if embeddings.is_dir() else None,
        execute=execute,
    )
    if config.device.startswith("cuda"):
        encoder.encode("", "")  # records the graphs of a pair of short prompts

    def encode_to_cpu(*prompts):
        # Triton's response cache takes nothing else, and what the loop copies is small.
        return {name: tensor.cpu() for name, tensor in encoder.encode(*prompts).items()}

    encode = cached(
        encode_to_cpu,
        folder,
        facts=(__version__, torch.__version__, config.device, config.engine, dtype),
        count=triton.counter(
            "fullpipe_embedding_cache_total",
            "Look-ups of embeddings in the shared cache, by result",
            "result",
            model=folder.parent.name,
        ),
    )

    def stage(inputs):
        clip_skip = inputs.get("clip_skip")
        return encode(
            triton.text("prompt", inputs["prompt"]),
            triton.text("negative_prompt", inputs.get("negative_prompt")),
            None if clip_skip is None else int(clip_skip[0]),
        )

    return stage


def unet(folder, config):
    """sample, timestep, encoder_hidden_states[, text_embeds, time_ids] → noise_pred."""
    stage_dtype(config)
    import torch

    from fullpipe.engines.graphed import GraphedUNet
    from fullpipe.engines.loading import load_unet

    engine = load_unet(folder / "unet", pipeline_config(folder), config.device)
    if engine.is_capturable:
        engine = GraphedUNet(engine, torch.device(config.device))

    def stage(inputs):
        tensors = {name: from_numpy(value).to(config.device) for name, value in inputs.items()}
        return {"noise_pred": engine.run(tensors)["noise_pred"].cpu()}

    return stage


def vae_decoder(folder, config):
    """latents → images."""
    stage_dtype(config)
    from fullpipe.engines.loading import load_vae_decoder

    decoder = load_vae_decoder(folder / "vae", pipeline_config(folder), config.device)
    return lambda inputs: {"images": decoder.decode(from_numpy(inputs["latents"]))}


def vae_encoder(folder, config):
    """images → latents."""
    dtype = stage_dtype(config)
    if config.engine != "torch":
        from fullpipe.engines.loading import load_vae_encoder

        encoder = load_vae_encoder(folder / "vae", pipeline_config(folder), config.device)
    else:
        from fullpipe.stages import VaeEncoder

        encoder = VaeEncoder(folder / "vae", device=config.device, dtype=dtype)
    return lambda inputs: {"latents": encoder.encode(from_numpy(inputs["images"]))}


def image_encoder(folder, config):
    """images, output_format → image (base64, one per picture), images (raw only)."""
    from fullpipe.image import encode_images

    def stage(inputs):
        pixels = inputs["images"]
        output_format = triton.text("output_format", inputs.get("output_format")) or "png"
        if output_format == "raw":
            return {"image": [], "images": pixels}
        return {"image": encode_images(pixels, output_format), "images": pixels[:0]}

    return stage


STAGES = {
    stage.__name__: stage for stage in (text_encoder, unet, vae_decoder, vae_encoder, image_encoder)
}


def pipeline_config(folder):
    """The pipeline that a stage's engine was built for."""
    from fullpipe.config import PipelineConfig

    return PipelineConfig.load(folder / "pipeline.json")


def stage_dtype(config):
    """The stage's torch dtype; imports torch, which the picture stage does without."""
    import torch

    from fullpipe.engines.loading import torch_dtype

    if config.torch_threads:
        torch.set_num_threads(config.torch_threads)
    return torch_dtype(config.precision)


def from_numpy(array):
    """A torch tensor over a request's array."""
    import torch

    return torch.from_numpy(array)
