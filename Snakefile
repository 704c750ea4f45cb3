# Snakemake's view of the pipeline. Rules are derived from dvc.yaml (stages, commands, edges, params keys), so
# both engines run the same graph. Each rule's output is the stamp in the stage's folder whose name bears the
# fingerprint of everything that the result depends on: where the stamp is, the result is current, whoever made
# it; where a param changed, another stamp is asked for. Times of files and Snakemake's own records decide nothing.
import sys

from crt.errors import UserError
from crt.params import load_params
from crt.pipeline import PARAMS_FILE, expected_fingerprints, load_stages, stamp_name

try:
    VALUES = load_params(PARAMS_FILE).model_dump(by_alias=True)
    STAGES = load_stages()
    FINGERPRINTS = expected_fingerprints(VALUES)
except UserError as error:
    print(
        *(f"error: {line}" for line in str(error).splitlines()),
        sep="\n",
        file=sys.stderr,
    )
    sys.exit(2)

STAMPS = {
    stage.output: f"{stage.output}/{stamp_name(FINGERPRINTS[name])}"
    for name, stage in STAGES.items()
}


rule all:
    default_target: True
    input:
        *STAMPS.values(),


for stage in STAGES.values():

    rule:
        name:
            stage.name
        input:
            # ancient: a newer file time alone makes nothing stale, the fingerprint does.
            [ancient(STAMPS[path]) for path in stage.inputs],
        output:
            STAMPS[stage.output],
            *stage.metrics,
        log:
            stage.log,
        threads: workflow.cores or 1
        resources:
            **stage.resources,
        params:
            command=stage.command,
        shell:
            "{params.command}"
