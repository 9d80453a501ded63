"""Captions and reports that say nothing clinical, or little but numbers."""

import re

LEAST_WORDS = 3
MOST_NUMBERS = 0.4
WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
NUMBER = re.compile(r"(?<![\w.])[<>=≤≥±]?\d+(?:[.,]\d+)*%?(?![\w])")

# stems of words, in lower case: what an image shows, where, and by which means
_WORDS = """
abdom abnormal abscess acute aden airspace airway alveol aneurysm angio anomal anter aort apex
apic append arter artery arthr artifact ascites aspir atelect athero atherosc atri axial axilla
axon bacter benign biliary biops bladder bleed blood bone bony bowel brain breast bronch bulla
bullet calcif calcul cancer capill carcin cardi cardiac carotid cartil cath catheter cavity cell
cerebel cerebr cervic chest cholecyst chondr chroni cirrh clavic clear colon colonosc consolid
contrast contus cornea coronal coronary cortex cortic costophrenic cranial cyst cyto degenerat
dens dental dermat dermis diagnos diaphrag dilat disc diseas disloc distal doppler duct ductal
echo ectasia edema effus embol emphys endo endosc enhanc enlarg eosin epider epith erosi esoph
exudat eye fascia femor femur fibro fibula field fissur fistul flair fluid focal foci follicul
foramen fract fundus gallbl gangl gastr giemsa gland gliom graft granul groin hand heart hemangi
hemato hematox hemi hemorrh hepat hernia hilar hilum hip histolog humer hydro hyper hypertroph
hypo hypodens hypoech ileum iliac immunohist implant incis infarct infect infiltr inflam injur
intens interstit intestin intracran ischem jaw jejun joint keratin kidney knee kyph lacrim laryn
lesion leukem leuko lipid lipom liver lobar lobe lobul lucen lumbar lumen lung lymph macula malign
mammo mandib marrow mass maxill mediastin melan mening menisc metast micro mitos mitral mri mucos
muscle muscul myel myelin myo necro neopl nephr nerv neur nevus node nodul normal nucle obstruct
occlus ocular opac opacit oper optic orbit osseous osteo ovar ovary pacem palat pancrea papill
parasit parench patell pelvi pelvis perfor pericard perine periph peritone pharyn plaque plasm
pleur pneum polyp portal poster prolif prostat prosthe pulmon pupil radiogra radiolog radius
rectal rectum renal resect retina rib rotator sacr sagittal sarcom scan scar scler scolio sept
septum sequel shoulder sinus skin skull smear spinal spine spleen splen spondyl squam stain stenos
stent sternum stomach stroke stroma subcutan subdur suture swell syndrom synov teeth tendon testi
thalam therap thick thora thromb thymus thyroid tibia tissue tomogra tonsil tooth trachea trauma
tuber tubul tumor tumour tympan ulcer ulna ultraso umbil ureter urethr urin uter uterus vagin valv
varic vascul vein veno ventric vertebr vessel villi viral vitre wound x-ray xray zygom
"""
STEMS = sorted(_WORDS.split(), key=len, reverse=True)
ENDINGS = ("itis", "oma", "omas", "osis", "emia", "pathy", "ectomy", "plasty", "scopy", "gram",
           "graphy", "plasia", "trophy", "algia", "cele", "lysis", "otomy", "ostomy")  # fmt: skip
SHORT = {"ct", "mr", "pet", "spect", "us", "ecg", "ekg", "oct", "pa", "ap", "svc", "ivc", "gi",
         "cxr", "ent", "icu", "ett", "picc", "dx"}  # fmt: skip
NOT_CLINICAL = {"diagram", "program", "programs", "histogram", "eyebrow", "fielding"}
# figures that show no patient
FIGURES = re.compile(
    r"\b(?:flow ?charts?|flow diagram|prisma|consort|bar (?:chart|graph|plot)s?|box ?plots?"
    r"|scatter ?plots?|forest plot|funnel plot|kaplan[- ]meier|roc curves?|receiver operating"
    r"|histograms? (?:of|show|for)|line graph|heat ?map of (?:gene|the correlation)|questionnaire"
    r"|graphical abstract|screen ?shots?|study (?:design|selection|protocol)|schematic|work ?flow"
    r"|pipeline|logo)\b",
    re.IGNORECASE,
)
_STEMS = re.compile("|".join(STEMS))


def is_clinical(word: str) -> bool:
    word = word.lower()
    if word in NOT_CLINICAL:
        return False
    if word in SHORT or _STEMS.match(word):
        return True
    return len(word) > 6 and word.endswith(ENDINGS)


def caption_fault(text: str) -> str | None:
    """Why a caption is left out, or None.

    "empty_caption": fewer than LEAST_WORDS words; "numbers": more than MOST_NUMBERS of its words
    are numbers; "no_patient": a chart, a flow diagram, a schematic; "not_clinical": no word of
    anatomy, disease or examination.
    """
    words = WORD.findall(text)
    if len(words) < LEAST_WORDS:
        return "empty_caption"
    numbers = len(NUMBER.findall(text))
    if numbers > MOST_NUMBERS * (numbers + len(words)):
        return "numbers"
    if FIGURES.search(text):
        return "no_patient"
    return None if any(map(is_clinical, words)) else "not_clinical"
