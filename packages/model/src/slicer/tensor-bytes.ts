/**
 * Owns reading the bytes of one small tensor of a published graph.
 */
import { closeSync, openSync, readSync } from 'node:fs';
import type { PublishedTensor } from './onnx-file.ts';

export function readTensorBytes({ source }: PublishedTensor): Uint8Array {
  if (source instanceof Uint8Array) return source;
  const bytes = Buffer.alloc(source.byteLength);
  const file = openSync(source.file, 'r');
  try {
    for (let at = 0; at < bytes.byteLength; ) {
      const read = readSync(file, bytes, at, bytes.byteLength - at, source.byteOffset + at);
      if (read === 0) throw new RangeError(`${source.file} is cut off`);
      at += read;
    }
  } finally {
    closeSync(file);
  }
  return bytes;
}
