"""What a curriculum will cost: a rehearsal of its steps, a calibration on a few prompts, and arithmetic.

``prediction`` puts together what ``rehearsal`` lists, ``calibration`` measures (``meter``, ``samples``, ``files``) and
``estimate`` adds up, in the ``terms`` of a plan.
"""
