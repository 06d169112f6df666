/**
 * Owns the KV memory of the portable kernel and the conversion of rows into and out of it.
 *
 * Invariants
 * 1. Exactly numBlocks * blockBytes in one ArrayBuffer, or in several of whole blocks when that exceeds 1 GiB.
 * 2. Layout in elements: [block][layer][kvHead]{ K [blockSizeTokens][headDim], V [blockSizeTokens][headDim] }. K is not
 *    transposed as in the native kernel: scalar code sums along headDim.
 */
import { blockBytes, float16Table, float32ToFloat16Bits, type KvLayout } from '@lamina/tensor';

const MAX_CHUNK_BYTES = 2 ** 30;

export class PortableSlab {
  readonly #chunks: (Uint16Array | Float32Array)[] = [];
  readonly #blocksPerChunk: number;
  readonly #blockElements: number;
  readonly #halfElements: number;
  readonly #numKvHeads: number;
  readonly #headDim: number;
  readonly #isF16: boolean;

  /** Throws RangeError when memory is refused. */
  constructor(layout: KvLayout, numBlocks: number) {
    const bytesPerBlock = blockBytes(layout);
    this.#isF16 = layout.kvDtype === 'f16';
    this.#blockElements = bytesPerBlock / (this.#isF16 ? 2 : 4);
    this.#halfElements = layout.blockSizeTokens * layout.headDim;
    this.#numKvHeads = layout.numKvHeads;
    this.#headDim = layout.headDim;
    this.#blocksPerChunk = Math.max(1, Math.floor(MAX_CHUNK_BYTES / bytesPerBlock));
    for (let block = 0; block < numBlocks; block += this.#blocksPerChunk) {
      const buffer = new ArrayBuffer(Math.min(this.#blocksPerChunk, numBlocks - block) * bytesPerBlock);
      this.#chunks.push(this.#isF16 ? new Uint16Array(buffer) : new Float32Array(buffer));
    }
  }

  /** Stores one head's row; `offset` is the token's place in the block. */
  store(
    which: 'k' | 'v',
    physicalBlock: number,
    offset: number,
    layer: number,
    kvHead: number,
    source: Float32Array,
    at: number,
  ): void {
    const headDim = this.#headDim;
    const chunk = this.#chunk(physicalBlock);
    const target = this.#start(physicalBlock, layer, kvHead, which) + offset * headDim;
    if (this.#isF16) {
      for (let d = 0; d < headDim; d++) chunk[target + d] = float32ToFloat16Bits(source[at + d]!);
    } else {
      for (let d = 0; d < headDim; d++) chunk[target + d] = source[at + d]!;
    }
  }

  /** Copies the first numTokens rows [numTokens, headDim] as float32 into `out`. */
  load(
    which: 'k' | 'v',
    physicalBlock: number,
    numTokens: number,
    layer: number,
    kvHead: number,
    out: Float32Array,
  ): void {
    const chunk = this.#chunk(physicalBlock);
    const start = this.#start(physicalBlock, layer, kvHead, which);
    const count = numTokens * this.#headDim;
    if (this.#isF16) {
      const table = float16Table();
      for (let i = 0; i < count; i++) out[i] = table[chunk[start + i]!]!;
    } else {
      out.set(chunk.subarray(start, start + count));
    }
  }

  #chunk(physicalBlock: number): Uint16Array | Float32Array {
    return this.#chunks[Math.floor(physicalBlock / this.#blocksPerChunk)]!;
  }

  #start(physicalBlock: number, layer: number, kvHead: number, which: 'k' | 'v'): number {
    const block = (physicalBlock % this.#blocksPerChunk) * this.#blockElements;
    return block + ((layer * this.#numKvHeads + kvHead) * 2 + (which === 'k' ? 0 : 1)) * this.#halfElements;
  }
}
