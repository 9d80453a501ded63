"""Results as the paper prints them, percent unless said otherwise (arXiv 2603.00842, v1)."""

SOURCE = "MedGPT-oss, arXiv 2603.00842 v1"
MODELS = ("MedGPT-oss", "OctoMed", "Hulu-Med", "Lingshu", "MedGemma", "QoQ-Med")
TABLE: dict[str, tuple[float, ...]] = {
    "MedXpertQA-MM": (49.23, 25.60, 34.35, 31.43, 30.90, 29.64),
    "SLAKE (in distribution)": (71.53, 65.07, 69.14, 72.24, 55.98, 46.53),
    "MedFrameQA": (63.01, 42.82, 62.82, 61.01, 47.63, 55.73),
    "MMMU-Med dev": (61.49, 47.65, 57.71, 59.43, 47.43, 51.84),
    "MMMU-Med-Pro, 4 options": (52.34, 44.62, 52.45, 52.67, 45.80, 46.93),
    "MMMU-Med-Pro, 10 options": (39.94, 23.07, 37.41, 43.45, 36.71, 38.12),
    "patient-trial, 0-shot": (48.81, 40.96, 51.01, 52.07, 31.03, 45.20),
    "patient-trial, 1-shot": (55.60, 40.02, 47.00, 48.91, 52.24, 47.41),
    "impression RaTEScore, 0-shot": (47.22, 31.04, 43.14, 43.80, 38.42, 41.44),
    "impression RaTEScore, 1-shot": (47.25, 30.91, 41.52, 40.27, 38.29, 40.71),
    "MedXpertQA text": (25.38,),
    "Medbullets": (68.71,),
    "MMLU-Med": (72.59,),
}
# RadGraph-F1, RaTEScore and 1/RadCliQ-v1 of MedGPT-oss, multi-view and longitudinal
MIMIC_FINDINGS = {"RadGraph-F1": 0.189, "RaTEScore": 0.522, "1/RadCliQ-v1": 0.803}
NOT_ACCURACY = ("impression RaTEScore, 0-shot", "impression RaTEScore, 1-shot")


def published(row: str) -> dict[str, float]:
    """Fraction by model of one row of the paper's tables; empty where it has none."""
    return {m: v / 100 for m, v in zip(MODELS, TABLE.get(row, ()), strict=False)}
