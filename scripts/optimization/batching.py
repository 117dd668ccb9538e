"""What config.pbtxt of an ONNX model can say about batching."""

from dataclasses import dataclass

from tritonclient.grpc.model_config_pb2 import ModelConfig

THREADS = "intra_op_thread_count"


@dataclass(frozen=True)
class Settings:
    """Values of config.pbtxt. max_queue_delay_us: None is batching off. threads: of each instance."""

    max_batch_size: int
    max_queue_delay_us: int | None
    instances: int
    threads: int

    def apply(self, config: ModelConfig) -> None:
        """Write the values into `config`."""
        config.max_batch_size = self.max_batch_size
        config.ClearField("dynamic_batching")
        if self.max_queue_delay_us is not None:
            config.dynamic_batching.max_queue_delay_microseconds = self.max_queue_delay_us
            config.dynamic_batching.SetInParent()
        config.instance_group[0].count = self.instances
        config.parameters[THREADS].string_value = str(self.threads)
        for warmup in config.model_warmup:
            warmup.batch_size = min(warmup.batch_size, self.max_batch_size)

    def describe(self) -> str:
        """Return the values in a few words."""
        delay = "off" if self.max_queue_delay_us is None else f"delay {self.max_queue_delay_us} us"
        return f"batch {self.max_batch_size}, {delay}, {self.instances} x {self.threads} threads"
