/**
 * Owns reading and writing whole buffers at positions of a file.
 *
 * Invariants
 * 1. A short read or write is continued, never taken for a whole one.
 */
import type { FileHandle } from 'node:fs/promises';

/** Writes all bytes of `data` at `position`; returns the position after them. */
export async function writeFully(file: FileHandle, data: ArrayBufferView, position: number): Promise<number> {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  let written = 0;
  while (written < bytes.byteLength) {
    written += (await file.write(bytes, written, bytes.byteLength - written, position + written)).bytesWritten;
  }
  return position + bytes.byteLength;
}

/** `byteLength` bytes from `position`, or fewer where the file ends. */
export async function readFully(file: FileHandle, position: number, byteLength: number): Promise<Uint8Array> {
  const bytes = new Uint8Array(byteLength);
  let filled = 0;
  while (filled < byteLength) {
    const { bytesRead } = await file.read(bytes, filled, byteLength - filled, position + filled);
    if (bytesRead === 0) break;
    filled += bytesRead;
  }
  return bytes.subarray(0, filled);
}
