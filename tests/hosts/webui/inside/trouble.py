"""An extension for the tests: it does what other extensions do, and what goes wrong. Its one control says what."""

from __future__ import annotations

import copy

import gradio as gr
import torch
from modules import script_callbacks, scripts, sd_unet, shared, ui_extra_networks
from modules.processing import StableDiffusionProcessingTxt2Img, process_images

LABEL = "bypassing engine"
now: dict = {"kind": "", "seen": 0, "handle": None, "notes": [], "comments": ""}


class Trouble(scripts.Script):
    def title(self):
        return "Trouble"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Textbox("", label="Trouble", visible=False)]  # not in screenshots

    def process(self, p, kind="", *args):
        calm()
        now.update(kind=kind or "", seen=0)
        unet = shared.sd_model.model.diffusion_model
        if kind in ("exception", "nan"):
            now["handle"] = unet.register_forward_hook(after_unet)
        if kind == "own sampling":
            take_over(p)

    def postprocess(self, p, processed, *args):
        now["comments"] = processed.comments

    def postprocess_image(self, p, pp, *args):
        kind = now["kind"]
        if kind in ("second picture", "copy"):
            now["kind"] = ""
            pp.image = (another(p) if kind == "second picture" else a_copy(p)).images[0]


def after_unet(unet, args, out):
    now["seen"] += 1
    if now["seen"] < 3:
        return None
    if now["kind"] == "exception":
        raise RuntimeError("trouble in the UNet")
    return torch.full_like(out, float("nan")) if now["seen"] == 3 else None


def calm():
    if now["handle"] is not None:
        now["handle"].remove()
    now.update(kind="", handle=None)


def take_over(p):
    """As an extension that samples on its own: the class's method, around whatever stands on the instance."""
    original = type(p).sample

    def sample(*args, **kwargs):
        return original(p, *args, **kwargs)

    p.sample = sample


def another(p):
    """As ADetailer: a fresh run with a script runner of its own."""
    fresh = StableDiffusionProcessingTxt2Img(
        sd_model=shared.sd_model,
        prompt=p.main_prompt, steps=p.steps, width=p.width, height=p.height, seed=p.seeds[0], cfg_scale=p.cfg_scale,
        sampler_name=p.sampler_name, do_not_save_samples=True, do_not_save_grid=True,
    )  # fmt: skip
    return process_images(fresh)


def a_copy(p):
    fresh = copy.copy(p)
    fresh.scripts = None
    fresh.__dict__.pop("sample", None)
    return process_images(fresh)


def rows(params):
    if now["kind"] == "rows":  # as an extension that changes the batch
        params.x = torch.cat([params.x, params.x[:1]])
        params.sigma = torch.cat([params.sigma, params.sigma[:1]])
        params.text_uncond = torch.cat([params.text_uncond, params.text_uncond[:1]])
        params.image_cond = torch.cat([params.image_cond, params.image_cond[:1]])


def denoiser(params):
    now["params"] = params


def denoised(params):
    if now["kind"] not in ("further prompt pass", "further negative pass"):
        return
    asked = now["params"]
    pictures = asked.text_uncond.shape[0]
    rows = slice(0, pictures) if now["kind"] == "further prompt pass" else slice(-pictures, None)
    text = asked.text_cond[:pictures] if now["kind"] == "further prompt pass" else asked.text_uncond
    image = asked.image_cond[rows]
    out = params.inner_model(asked.x[rows], asked.sigma[rows], cond={"c_crossattn": [text], "c_concat": [image]})
    now["notes"].append(float((out - params.x[rows]).abs().max()))


class Engine(sd_unet.SdUnet):
    def forward(self, x, timesteps, context, *args, **kwargs):
        return x * 0.1


class Option(sd_unet.SdUnetOption):
    model_name, label = "", LABEL

    def create_unet(self):
        return Engine()


def routes(demo, app):
    app.add_api_route("/trouble/notes", lambda: now["notes"], methods=["GET"])
    app.add_api_route("/trouble/comments", lambda: now["comments"], methods=["GET"])
    app.add_api_route("/trouble/cards", cards, methods=["GET"])
    app.add_api_route("/trouble/restart", shared.state.request_restart, methods=["POST"])
    app.add_api_route("/trouble/hooks", hooks, methods=["GET"])


def cards():
    """The cards of our tab, as the page would show them: name -> what a click puts into the prompt."""
    page = next(page for page in ui_extra_networks.extra_pages if page.title == "Concepts")
    return {item["name"]: item["prompt"] for item in page.list_items()}


def hooks():
    """How many hooks the UNet has now."""
    unet = shared.sd_model.model.diffusion_model
    return len(unet._forward_pre_hooks) + sum(len(layer._forward_hooks) for layer in unet.middle_block)


script_callbacks.on_cfg_denoiser(denoiser)
script_callbacks.on_cfg_denoiser(rows)
found = script_callbacks.callback_map["callbacks_cfg_denoiser"]
found.insert(0, found.pop())  # before ours
script_callbacks.on_cfg_denoised(denoised)
script_callbacks.on_list_unets(lambda found: found.append(Option()))
script_callbacks.on_app_started(routes)
