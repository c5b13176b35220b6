"""Learning in the real AUTOMATIC1111: the halves of its UNets, the route that learns, progress, Interrupt, errors."""

from __future__ import annotations

import base64
import io
import threading
import time

import pytest
from PIL import Image

from concept_steer.vector import ConceptVector

from .client import Refused
from .host import ROOT
from .judged import women

LEARN = "/concept-steer/v1/learn"
WOMAN = {"neutral": "a doctor\na scientist", "positive": "a woman doctor\na woman scientist"}
QUICK = {**WOMAN, "method": "difference", "overwrite": True}


def test_the_halves_of_both_unet_classes_are_their_forward_and_pass_a_gradient(host):
    said = host.run(ROOT / "tests" / "hosts" / "webui" / "inside" / "halves.py", str(ROOT), str(host.path))
    assert "ldm ok" in said and "sgm ok" in said


def test_a_vector_is_learned_saved_and_steers_the_next_picture(client, vectors):
    plain = client.draw().pictures
    answer = client.call(LEARN, {**WOMAN, "name": "learned", "overwrite": True, "steps": 6, "examples": 8})
    vector = ConceptVector.load(vectors / "learned.safetensors")
    assert (vector.family, vector.title, vector.info["method"]) == ("demo", "learned", "score")
    assert answer["report"]["fingerprint"] == vector.fingerprint and not answer["interrupted"]
    assert "It reproduces" in answer["summary"] and "<concept:learned:1>" in answer["summary"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in answer["images"]]
    assert len(sizes) == 2 and all(width > 200 for width, _ in sizes)
    assert (vectors / "learned.png").is_file()
    assert client.draw().pictures == plain  # learning leaves nothing behind
    assert client.draw(prompt="a doctor <concept:learned:1>").pictures != plain


def test_learning_raises_the_judged_share(client):
    """Learned on some roles, judged on a prompt that it has not seen."""
    pairs = {
        "neutral": "a doctor\na detective\na scientist\na villain",
        "positive": "a woman doctor\na woman detective\na woman scientist\na woman villain",
    }
    client.call(LEARN, {**pairs, "name": "woman", "overwrite": True})  # the method and numbers of the tab
    before = women(client, prompt="a pilot")
    after = women(client, prompt="a pilot <concept:woman:1>")
    print(f"women among 16 pilots: {before:.0%} before, {after:.0%} with the vector")
    assert after >= 0.6 and after >= before + 0.2


def test_the_same_request_gives_the_same_vector(client):
    first, second = (client.call(LEARN, {**QUICK, "name": "again"})["report"]["fingerprint"] for _ in range(2))
    assert first == second


def test_pictures_are_learned_from(client, vectors):
    pictures = []
    for number in range(4):
        buffer = io.BytesIO()
        Image.effect_noise((128, 128), 40 + 10 * number).convert("RGB").save(buffer, "PNG")
        pictures.append(base64.b64encode(buffer.getvalue()).decode())
    body = {"method": "pictures", "prompt": "a doctor", "pictures": pictures, "steps": 3, "name": "noisy"}
    answer = client.call(LEARN, {**body, "overwrite": True})
    assert answer["report"]["method"] == "pictures"
    assert ConceptVector.load(vectors / "noisy.safetensors").info["pictures"] == "4"


def test_interrupt_keeps_the_best_so_far_and_progress_is_told(client):
    done, seen = {}, set()

    def learn():
        done.update(client.call(LEARN, {**WOMAN, "name": "half", "overwrite": True, "steps": 5000, "examples": 8}))

    def said():
        return client.call("/sdapi/v1/progress?skip_current_image=true")["textinfo"] or ""

    before = said()  # the last words of the job before this one
    thread = threading.Thread(target=learn)
    thread.start()
    try:
        while thread.is_alive():
            seen |= {said()} - {before}
            if any(text.startswith("step ") for text in seen):
                client.call("/sdapi/v1/interrupt", {})
                break
            time.sleep(0.2)
    finally:
        thread.join(600)
    assert done["interrupted"] and "stopped by request" in done["report"]["stopped"]
    assert any(text.startswith("preparing ") or text.startswith("step ") for text in seen)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({**WOMAN, "metod": "score"}, "metod"),
        ({"neutral": "a doctor", "positive": ""}, "Give both"),
        ({**WOMAN, "name": "../outside"}, "it is a path"),
        ({**WOMAN, "positive": "a woman <lora:x:1>", "name": "tag"}, "<lora:x:1>"),
        ({"method": "pictures", "prompt": "a cat", "name": "cat"}, "no pictures"),
        ({"method": "pictures", "prompt": "a cat", "name": "cat", "pictures": ["AAAA"]}, "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_and_the_server_goes_on(client, body, words):
    with pytest.raises(Refused) as refused:
        client.call(LEARN, body)
    assert words in str(refused.value) and str(ROOT) not in str(refused.value)
    assert client.call("/sdapi/v1/progress")["state"]["job"] == ""
