"""Good images for a while, then the same under a dimmer lamp: `unispect monitor` notices."""

import json
from pathlib import Path

from PIL import Image, ImageEnhance

from unispect import Inspector, write_products
from unispect.monitor import monitor

data = write_products("out/monitored", train=150, good=60, bad=1, size=64, products=["gear"])
config = {"method": "opca", "preparation": {"size": 64}, "decision": {"false_alarm_rate": 0.05}}
model = Inspector.fit(data, config).save("out/monitored-model", overwrite=True)
inspector = Inspector.load(model)

good = [Image.open(path).convert("RGB") for path in sorted(data.glob("*/test/good/*.png"))]
dim = [ImageEnhance.Brightness(image).enhance(0.6) for image in good]
findings = [inspector.inspect(image).as_dict() for image in [*good, *dim]]
log = Path("out/monitored.jsonl")  # as `unispect inspect MODEL IMAGES --json > log.jsonl` writes it
log.write_text("".join(json.dumps(finding) + "\n" for finding in findings))

found = monitor(model, log)
for alarm in found.alarms:
    print(alarm.text())
