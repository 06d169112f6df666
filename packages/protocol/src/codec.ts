/**
 * Owns msgpack: the only place that imports msgpackr.
 *
 * Invariants
 * 1. Maps are encoded as plain msgpack maps (no records extension), so any msgpack client can read them.
 * 2. Typed arrays travel as raw bytes; their dtype and shape are part of the schema that reads them.
 * 3. What is unpacked is `unknown` until a schema has accepted it.
 */
import { LaminaError } from '@lamina/tensor';
import { Packr } from 'msgpackr';

const packr = new Packr({ useRecords: false, mapsAsObjects: true, int64AsType: 'number' });

export function packMessage(value: unknown): Uint8Array {
  return packr.pack(value);
}

/** @throws LaminaError `protocol_violation` when the bytes are no msgpack value. */
export function unpackMessage(bytes: Uint8Array): unknown {
  try {
    return packr.unpack(bytes);
  } catch (cause) {
    throw new LaminaError('protocol_violation', 'a message is not valid msgpack', {
      cause,
      diagnostics: { bytes: bytes.length },
    });
  }
}
