"""The program that decodes JPEG 2000, and whatever gdcm decodes, in a process of its own.

On some damaged frames gdcm ends the whole process (an uncaught C++ exception), and pydicom's
reading of JPEG 2000 boxes never ends. Here they harm only this process, which has little time and
memory. Run by dicom_frames; imports nothing but numpy and pydicom.

Standard input: one JSON line {syntax, plugin, options, seconds}, then frames, each behind its
length as eight bytes. Standard output: for each frame one JSON line {dtype, shape, photometric}
and the array's bytes.
"""

import json
import resource
import struct
import sys
import time

# until: python-gdcm 3.3
MAX_BYTES = 3 * 2**30  # of address space: several times the largest frame that is let through


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold the image
    import numpy as np
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders.base import get_decoder

    job = json.loads(sys.stdin.buffer.readline())
    decoder = get_decoder(job["syntax"])
    while head := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(struct.unpack("<Q", head)[0])
        until = int(time.process_time()) + 1 + job["seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))
        array, properties = decoder.as_array(
            encapsulate([data], has_bot=False),
            index=0,
            decoding_plugin=job["plugin"],
            **job["options"],
        )
        reply = {
            "dtype": array.dtype.str,
            "shape": array.shape,
            "photometric": properties.get("photometric_interpretation"),
        }
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.write(np.ascontiguousarray(array).tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
