"""derm-smol: SmolLM2-135M-Instruct as the language model of a LLaVA that answers questions about drawn lesions.

A model of real depth (30 layers, 135 M parameters) that anybody can run on two cores. The repository has what was
trained here: the projector and a LoRA adapter. The language model comes from a package, the tower from derm-tiny.
"""
