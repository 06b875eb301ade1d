from unispect import Inspector, evaluate, write_products, write_report

data = write_products("out/products", train=80)  # or your folder: <product>/train/good/*, or <product>/*
inspector = Inspector.fit(data, {"decision": {"false_alarm_rate": 0.02}})
inspector.save("out/model", overwrite=True)

finding = inspector.inspect("out/products/gear/test/hole/000.png")
print(finding.anomalous, finding.p_value, finding.product, finding.regions)

evaluation = evaluate(inspector, data)  # test images are read here and nowhere before
print(evaluation.text())
write_report(evaluation, "out/report.html", "Six products", {"model": "out/model"})
