"""Controllers beside other libraries: callbacks of training loops, adapters of PEFT."""
