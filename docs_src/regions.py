from unispect import Inspector, write_products

data = write_products("out/parts", train=80)
decision = {
    "false_alarm_rate": 0.02,
    "regions": "discovery",  # or "family", the default
    "discovery_rate": 0.1,
    "min_size_mm": 0.4,
    "mm_per_pixel": 0.05,  # or one for each product: {"gear": 0.05, "wood": 0.2, ...}
}
finding = Inspector.fit(data, {"decision": decision}).inspect("out/parts/gear/test/hole/000.png")
for region in finding.regions:
    print(
        region.left, region.top, region.right, region.bottom, region.area, region.area_mm2, region.p_value, region.promised
    )
