"""A client of ComfyUI's HTTP API, and what turns a workflow of its front end into a prompt."""

import json
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from safetensors.torch import load as load_tensors

# What make_models.py makes, for each file that a template names.
STAND_INS = {
    "v1-5-pruned-emaonly-fp16.safetensors": "sd15-base.safetensors",
    "DreamShaper_8_pruned.safetensors": "sd15-tuned.safetensors",
    "sd_xl_base_1.0.safetensors": "sdxl-base.safetensors",
    "SSD-1B-A1111.safetensors": "ssd-1b.safetensors",
    "MoXinV1.safetensors": "sd15-style.safetensors",
    "pixel-art-xl.safetensors": "sdxl-style.safetensors",
}


class Host:
    """A running ComfyUI server."""

    def __init__(self, url, log):
        self.url, self.log = url, log

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def json(self, path):
        return json.loads(self.get(path))

    def post(self, path, data):
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(data).encode(), header)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def queue(self, prompt):
        answer = self.post("/prompt", {"prompt": prompt})
        assert "prompt_id" in answer, answer
        return answer["prompt_id"]

    def wait(self, ticket, seconds=300):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.json(f"/history/{ticket}")
            if ticket in history:
                return Result(self, history[ticket])
            time.sleep(0.02)
        raise TimeoutError(self.log.read_text()[-3000:])

    def run(self, prompt):
        return self.wait(self.queue(prompt))

    def events(self, kind, prompt, python, out):
        """Return the result of a prompt and the events of a kind that came meanwhile."""
        words = [python, Path(__file__).with_name("listen.py"), self.url, "tester", kind, out]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline().strip() == "ready"
            answer = self.post("/prompt", {"prompt": prompt, "client_id": "tester"})
            result = self.wait(answer["prompt_id"])
            process.wait(30)
        return result, json.loads(Path(out).read_text())


class Result:
    """What the host's history says of a finished prompt."""

    def __init__(self, host, history):
        self.host, self.status = host, history["status"]
        self.outputs = history["outputs"]
        self.messages = {kind: content for kind, content in self.status["messages"]}

    @property
    def ok(self):
        return self.status["status_str"] == "success"

    @property
    def error(self):
        return self.messages["execution_error"]["exception_message"]

    def latent(self):
        (saved,) = [entry for output in self.outputs.values() for entry in output.get("latents", [])]
        query = f"/view?filename={saved['filename']}&subfolder={saved['subfolder']}&type={saved['type']}"
        return load_tensors(self.host.get(query))["latent_tensor"]


def to_prompt(workflow, info):
    """Return the prompt of a workflow: its links by name, its widgets by the order in which the host lists them."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in info:
            assert node["type"] in ("MarkdownNote", "Note"), node["type"]
            continue
        described = info[node["type"]]["input"]
        inputs = {entry["name"]: links[entry["link"]] for entry in node.get("inputs", []) if entry.get("link")}
        values = list(node.get("widgets_values") or [])
        for name, spec in (described.get("required", {}) | described.get("optional", {})).items():
            options = spec[1] if len(spec) > 1 else {}
            if isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                if options.get("forceInput"):
                    continue
                value = values.pop(0)
                inputs.setdefault(name, value)
                if options.get("control_after_generate") or name in ("seed", "noise_seed"):
                    values.pop(0)
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
