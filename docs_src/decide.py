from unispect import Inspector, write_products
from unispect.calibrate import keep, recalibrated, redecided, undone
from unispect.data.folder import read_folder

inspector = Inspector.load("out/model")
new = read_folder(write_products("out/tuesday", train=20, seed=5))  # good images that it has not learnt from

change = recalibrated(inspector, new, {"false_alarm_rate": 0.02})  # what would change
print(change.text())
keep(change, "out/model")  # is now version 2 of what decides; weights are untouched

stricter = redecided(change.after, {"guarantee": "product", "false_alarm_rate": 0.1})
print(stricter.text())
keep(undone(change.after), "out/model")  # as it was
