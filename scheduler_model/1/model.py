"""`scheduler_model`: the denoising loop as an ordinary Triton model.

`execute` only hands requests over and returns; the pipeline's threads answer later through each
request's response sender. So one instance serves many requests at once, and progress and cancel
calls get through at any time.
"""

import json
import os
import queue
import threading

import numpy as np
import torch

from fullpipe import __version__
from fullpipe import triton_adapter as triton
from fullpipe.cache_results import results_from_environment
from fullpipe.config import PipelineConfig
from fullpipe.engines import TOKENS, Engine
from fullpipe.engines.loading import load_unet, load_vae_decoder
from fullpipe.errors import SetupError
from fullpipe.pipeline import Pipeline
from fullpipe.traces import LoopTraces

EMBEDS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


class TritonPythonModel:
    """Translates between Triton and `fullpipe.pipeline.Pipeline`."""

    def initialize(self, args):
        """Load the pipeline's configuration and, unless it is served apart, the UNet."""
        triton.log_to_triton(args["model_name"])
        folder = triton.version_folder(args)
        try:
            config = PipelineConfig.load(folder / "pipeline.json")
            if config.loop.torch_threads:
                torch.set_num_threads(config.loop.torch_threads)
            make_unet = load_unet if config.loop.unet == "loop" else BlsUNet
            unets = [make_unet(folder / "unet", config, name) for name in config.loop.devices]
            if config.loop.vae == "loop":
                stages = OwnDecoder(config, folder.parents[1])
            else:
                stages = BlsStages(config)
        except SetupError as error:
            raise triton.abort_loading(error) from error
        self._metrics = triton.TritonMetrics(config.name)
        self._traces = LoopTraces.from_environment(config.name)
        self._pipeline = Pipeline(config, unets, stages, self._metrics, end_process)
        self._results = results_from_environment(
            self._pipeline.call, repr((config, __version__)), self._metrics.result_cache
        )
        self._call = self._results.call if self._results else self._pipeline.call

    def execute(self, requests):
        """Queue; the answers come later."""
        for request in requests:
            context = triton.trace_context(request) if self._traces else None
            inputs = triton.read_inputs(request)
            triton.add_job_id(request, inputs)
            self._take(triton.Sender(request), inputs, context)

    def finalize(self):
        """Answer what is open and end the threads."""
        if self._results:
            self._results.close()
        self._pipeline.close()
        self._metrics.close()
        if self._traces:
            self._traces.close()

    def _take(self, sender, inputs, context):
        def reply(outcome):
            if isinstance(outcome, Exception):
                sender.last(outcome)
            elif isinstance(outcome, dict):
                sender.last({**EMPTY, "event": json.dumps(outcome)})
            else:
                sender.last(
                    {
                        "images": NO_IMAGES if outcome.images is None else outcome.images,
                        "latents": outcome.latents,
                        "info": json.dumps(outcome.info),
                        "event": "",
                    }
                )
                if self._traces:
                    self._traces.finished(context, outcome.info)

        self._call(inputs, reply)


NO_IMAGES = np.zeros((0, 0, 0, 3), np.uint8)
EMPTY = {"images": NO_IMAGES, "latents": np.zeros((0, 0, 0, 0), np.float32), "info": ""}


def end_process():
    """End after the answers have left, so that whoever watches the server starts it again."""
    threading.Timer(1.0, os._exit, [1]).start()


class BlsUNet(Engine):
    """The Triton model `unet` as an engine: a call per tick."""

    def __init__(self, folder, config, device):
        self._model = config.models.unet
        self._device = device
        self._loop = config.loop
        self._scale = config.checkpoint.vae_scale_factor

    def row_counts(self, height, width, tokens):
        """See `fullpipe.engines.Engine`: those of `CompiledUNet`; the other engines take any."""
        is_built = [width * self._scale, height * self._scale] in self._loop.sizes
        if self._loop.engine != "compiled" or tokens != TOKENS or not is_built:
            return ()
        return tuple(self._loop.buckets)

    def run(self, tensors):
        """See `fullpipe.engines.Engine`."""
        inputs = {name: tensor.cpu() for name, tensor in tensors.items()}
        outputs = triton.call_model(self._model, inputs, ["noise_pred"])
        noise_pred = torch.from_dlpack(outputs["noise_pred"].to_dlpack())
        return {"noise_pred": noise_pred.to(self._device)}


class BlsStages:
    """The one-shot stages as Triton models."""

    def __init__(self, config):
        self._models = config.models

    def encode_text(self, prompt, negative_prompt, clip_skip):
        """See `fullpipe.pipeline.Stages`."""
        inputs = {"prompt": prompt, "negative_prompt": negative_prompt}
        if clip_skip is not None:
            inputs["clip_skip"] = np.array([clip_skip], np.int32)
        outputs = triton.call_model(self._models.text_encoder, inputs, EMBEDS)
        return {
            name: torch.from_dlpack(output.to_dlpack()).float() for name, output in outputs.items()
        }

    def encode_images(self, images):
        """See `fullpipe.pipeline.Stages`."""
        outputs = triton.call_model(self._models.vae_encoder, {"images": images}, ["latents"])
        return torch.from_dlpack(outputs["latents"].to_dlpack()).cpu()

    def decode_latents(self, latents):
        """See `fullpipe.pipeline.Stages`."""
        outputs = triton.call_model(self._models.vae_decoder, {"latents": latents}, ["images"])
        return outputs["images"].as_numpy()


class OwnDecoder(BlsStages):
    """The VAE's decoder in this process too; the other stages as Triton models.

    Two processes get a GPU in turns; two streams of one process get it together.
    """

    def __init__(self, config, repository):
        super().__init__(config)
        vae = repository / config.models.vae_decoder / "1" / "vae"
        # One for each device, in turns: a compiled package runs for one thread at a time.
        self._idle = queue.SimpleQueue()
        for device in config.loop.devices:
            stream = torch.cuda.Stream(device) if device.startswith("cuda") else None
            self._idle.put((load_vae_decoder(vae, config, device), stream))

    def decode_latents(self, latents):
        """See `fullpipe.pipeline.Stages`."""
        decoder, stream = self._idle.get()
        try:
            with torch.cuda.stream(stream):
                return decoder.decode(latents).numpy()
        finally:
            self._idle.put((decoder, stream))
