"""Every name that this project takes of a training library and that the library does not document.

One file a library, one function or constant a name. A function looks, the first time it is called, whether the name is
there and takes what it will be given, and refuses the installed version otherwise (`Library`). Afterwards it returns
what it found, so nothing is looked up or checked where the work is done. Each file says of which version it was read.

What cannot move here, because it is a subclass's override of a private method or attribute, is checked from here all
the same (`trl.check_hooks`, `trl.check_prepared`, `transformers.check_tied_weights`):

- `PackedDPOTrainer._prepare_dataset` (trainers/dpo.py), of `trl.DPOTrainer`
- `ClassicDPOTrainer._compute_loss` (trainers/classic.py), of `trl.DPOTrainer`
- `TextForCausalLM._tied_weights_keys` (models/text_part.py), of `transformers.PreTrainedModel`

Not here are the names of a decoder's modules (`q_proj`, `in_proj_qkv`): they are the checkpoints' own, described in
`planning.families` and looked for in the loaded model (`fused.build.missing_names`, `recurrent.delta_net`); nor names
in files (adapter_config.json, config.json); nor TRL's metrics, which its documentation lists.
"""
