/**
 * Owns msgpack: the only place that imports msgpackr.
 *
 * Invariants
 * 1. Maps are encoded as plain msgpack maps (no records extension), so any msgpack client can read them.
 * 2. Nothing is unpacked that `msgpack-check.ts` refuses, so msgpackr's extensions are out of reach. Tensors are no msgpack.
 * 3. What is unpacked is `unknown` until a schema has accepted it.
 */
import { LaminaError } from '@lamina/tensor';
import { Packr } from 'msgpackr';
import { LIMITS } from './limits.ts';
import { msgpackProblem } from './msgpack-check.ts';

const packr = new Packr({ useRecords: false, mapsAsObjects: true, int64AsType: 'number' });

export function packMessage(value: unknown): Uint8Array {
  return packr.pack(value);
}

/** @throws LaminaError `protocol_violation` that says what is wrong with the bytes. */
export function unpackMessage(bytes: Uint8Array): unknown {
  const problem = msgpackProblem(bytes, LIMITS.messageParts);
  if (problem !== undefined) throw unreadable(problem, bytes);
  return unpackChecked(bytes);
}

/** Of bytes that `msgpackProblem` has nothing to say about. */
export function unpackChecked(bytes: Uint8Array): unknown {
  try {
    return packr.unpack(bytes);
  } catch (cause) {
    throw unreadable('it cannot be unpacked', bytes, cause);
  }
}

function unreadable(problem: string, bytes: Uint8Array, cause?: unknown): LaminaError {
  return new LaminaError('protocol_violation', `a message is not valid msgpack: ${problem}`, {
    cause,
    diagnostics: { bytes: bytes.length },
  });
}
