"""What a params file costs on a given cluster, before anything runs."""
