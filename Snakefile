# Snakemake's view of the pipeline. Rules are derived from dvc.yaml (stages, commands, edges, params keys),
# so both engines run the same graph. Each rule's output is the stamp in the stage's folder whose name bears
# the fingerprint of everything the result depends on: if the stamp is there the result is current, whoever
# made it; if a param changes, another stamp is asked for. Times of files and Snakemake's own records decide nothing.
import sys

from snakemake.exceptions import WorkflowError

sys.path.insert(0, workflow.basedir)
from crt.errors import UserError
from crt.params import load_params
from crt.pipeline import PARAMS_FILE, expected_fingerprints, load_stages, stamp_name

try:
    VALUES = load_params(PARAMS_FILE).model_dump(by_alias=True)
    STAGES = load_stages()
    FINGERPRINTS = expected_fingerprints(VALUES)
except UserError as error:
    sys.exit("\n".join(f"error: {line}" for line in str(error).splitlines()))

STAMPS = {
    stage.output: f"{stage.output}/{stamp_name(FINGERPRINTS[name])}"
    for name, stage in STAGES.items()
}
