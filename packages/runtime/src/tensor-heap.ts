/**
 * Owns how V8 collects in the processes that pass tensors.
 *
 * Why so. What is read from a socket and written to one is memory outside of V8's heap. V8 counts it towards the limit of a
 * heap that is small (16 MB in a dense worker, its limit 39) and begins to collect when less than the new space is left: a
 * dense worker collected its whole heap seven times a second at 32 requests, at most once with these flags, for 18 % less CPU
 * of all processes (docs/performance.md). The price is a new space of up to 64 MB in each thread that is started afterwards.
 */
import { setFlagsFromString } from 'node:v8';

/** Of V8; a test asks the Node that runs it whether it knows them. */
export const TENSOR_HEAP_FLAGS: readonly string[] = [
  // Start to mark when nine tenths of the room are used; by default when what is left is less than the new space.
  '--incremental-marking-hard-trigger=90',
  '--incremental-marking-soft-trigger=90',
  // The room grows with the new space. Of threads that are started from now on.
  '--min-semi-space-size=32',
  '--max-semi-space-size=32',
];

/** Call first in a process, before it starts threads. */
export function makeRoomForTensors(): void {
  for (const flag of TENSOR_HEAP_FLAGS) setFlagsFromString(flag);
}
