# Snakemake's view of the pipeline. Rules are derived from dvc.yaml (stages, commands, edges, params keys), so
# both engines run the same graph. Each rule's output is the stamp in the stage's folder whose name bears the
# fingerprint of everything that the result depends on: where the stamp is, the result is current, whoever made
# it; where a param changed, another stamp is asked for. Times of files and Snakemake's own records decide nothing.
# Studies (studies/*.yaml) are the same stages unrolled over a grid, see crt/study.py: `snakemake study_NAME`.
import os
import sys
from pathlib import Path

from crt.errors import UserError
from crt.files import refuse_files_as_folders
from crt.launch import has_gpu
from crt.manifest import damaged_results
from crt.params import load_params
from crt.pipeline import (
    PARAMS_FILE,
    expected_fingerprints,
    load_stages,
    plot_files,
    refuse_config,
    stamp_name,
)
from crt.snakemake_records import MAKE_ANEW, forget_incomplete
from crt.study import (
    RUN_RULE,
    requested_studies,
    study_stamp,
    write_params_files,
)


def end_with(error):
    """Bad input: a line for each fault instead of a traceback."""
    print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
    sys.exit(2)


try:
    refuse_config(config)
    VALUES = load_params(PARAMS_FILE).model_dump(by_alias=True)
    FINGERPRINTS = expected_fingerprints(VALUES)
    # Rule name, stage, stamp, stamps of its inputs.
    JOBS = {}
    STAMPS = {stage.output: f"{stage.output}/{stamp_name(FINGERPRINTS[name])}" for name, stage in load_stages().items()}
    for name, stage in load_stages().items():
        JOBS[name] = (
            stage,
            STAMPS[stage.output],
            [STAMPS[path] for path in stage.inputs],
        )
    STUDIES = requested_studies(sys.argv)
    for _, _, runs in STUDIES.values():
        for run in runs:
            stamps = {stage.output: run.stamp(name) for name, stage in run.stages.items()}
            for name, stage in run.stages.items():
                job = f"{RUN_RULE}_{name}_{run.fingerprints[name][:16]}"
                JOBS[job] = (
                    stage,
                    stamps[stage.output],
                    [stamps[path] for path in stage.inputs],
                )
    refuse_files_as_folders(Path(stage.output) for stage, _, _ in JOBS.values())
except UserError as error:
    end_with(error)


def shown(stage):
    """Files that `snakemake --report` shows, with titles: what the main run's evaluate draws.

    Only of that stage: Snakemake deletes a rule's outputs before it starts, which costs evaluate seconds, but would make
    a training whose job was submitted twice start from zero.
    """
    if stage.name != "evaluate" or stage.output not in STAMPS:
        return {}
    files = {f"{stage.output}/report.html": "report"} | plot_files()
    return {path: files[path] for path in files if path.startswith(f"{stage.output}/")}


if workflow.is_main_process:
    # It sees the stamps alone. Of the main run only: a study may have thousands of folders.
    print(*(f"warning: {line}\n" for line in damaged_results(STAMPS.values())), sep="", end="", file=sys.stderr)
    forget_incomplete(
        [
            *(path for stage, stamp, _ in JOBS.values() for path in (stamp, *stage.metrics, *shown(stage))),
            *(study_stamp(*study) for study in STUDIES.values()),
        ]
    )


# Jobs on a cluster inherit it; the Snakemake in them runs no such hook, and always has --force.
onstart:
    if workflow.dag_settings.forceall or workflow.dag_settings.forcetargets or workflow.dag_settings.forcerun:
        os.environ[MAKE_ANEW] = "1"
    # Here, since a dry run is to write nothing.
    try:
        for run in (run for _, _, runs in STUDIES.values() for run in runs):
            write_params_files(run)
    except UserError as error:
        end_with(error)


# Used only with `--software-deployment-method apptainer`; made from workflow/apptainer.def.
container: "crt.sif"


# Without GPUs the runs of a study share the cores, one each; otherwise each stage in turn has all cores and all GPUs.
# On a cluster threads follow from the CPUs that each job was given.
CORES = workflow.resource_settings.cores or 1


rule all:
    default_target: True
    input:
        *STAMPS.values(),
        # A picture that was deleted is drawn again.
        *(path for stage in load_stages().values() for path in (*stage.metrics, *shown(stage))),


for name, (stage, stamp, inputs) in JOBS.items():

    rule:
        name:
            name
        input:
            # ancient: a newer file time alone makes nothing stale, the fingerprint does.
            [ancient(path) for path in inputs],
        output:
            stamp,
            *stage.metrics,
            *(report(path, category=stage.name, labels={"figure": title}) for path, title in shown(stage).items()),
        log:
            stage.log,
        threads: 1 if name.startswith(RUN_RULE) and not has_gpu() else CORES
        params:
            command=stage.command,
        shell:
            "{params.command}"

    # A study's runs ask for what the profile sets for their stage.
    wanted = workflow.resource_settings.overwrite_resources.get(stage.name, {})
    workflow.get_rule(name).resources.update(wanted)


for name, (file, scale, runs) in STUDIES.items():

    rule:
        name:
            name
        input:
            [ancient(run.stamp("evaluate")) for run in runs],
        output:
            study_stamp(file, scale, runs),
        params:
            command=f"python -m crt study --study {file} --scale {scale}",
        shell:
            "{params.command}"
