/**
 * Owns the choice between the native and the portable kernel.
 *
 * Invariants
 * 1. Every way to fail is a LaminaError('config_invalid') that says what to change.
 * 2. More memory than the machine has is refused at once, whatever the operating system would promise.
 * 3. 'auto' falls back only when the addon cannot be loaded, never to hide that memory is short.
 */
import { totalmem } from 'node:os';
import { blockBytes, HEAD_DIM_RANGE, type KvLayout, LaminaError } from '@lamina/tensor';
import type { AttentionKernel, CreateKernelOptions } from './kernel.ts';
import { loadNativeAddon } from './native-addon.ts';
import { NativeKernel } from './native-kernel.ts';
import { PortableKernel } from './portable-kernel.ts';

const MAX_BLOCK_SIZE_TOKENS = 4096;
const MAX_THREADS = 1024;

function checkRange(name: string, value: number, minimum: number, maximum: number, multipleOf: number): void {
  if (!Number.isInteger(value) || value < minimum || value > maximum || value % multipleOf !== 0) {
    const unit = multipleOf === 1 ? 'an integer' : `a multiple of ${multipleOf}`;
    throw new LaminaError(
      'config_invalid',
      `attention kernel: ${name} is ${value}; it must be ${unit}, ${minimum}..${maximum}`,
    );
  }
}

function checkLayout(layout: KvLayout): void {
  checkRange('numLayers', layout.numLayers, 1, 65536, 1);
  checkRange('numKvHeads', layout.numKvHeads, 1, 65536, 1);
  checkRange('numHeads', layout.numHeads, 1, 65536, layout.numKvHeads);
  checkRange('headDim', layout.headDim, HEAD_DIM_RANGE.minimum, HEAD_DIM_RANGE.maximum, HEAD_DIM_RANGE.multipleOf);
  checkRange('blockSizeTokens', layout.blockSizeTokens, 8, MAX_BLOCK_SIZE_TOKENS, 8);
  if (!Number.isFinite(layout.scale)) {
    throw new LaminaError('config_invalid', `attention kernel: scale is ${layout.scale}; it must be finite`);
  }
  checkScoreRules(layout);
}

function checkScoreRules({ softcap, windowTokens, alibiSlopes, numLayers, numHeads }: KvLayout): void {
  if (softcap !== undefined && !(softcap > 0 && Number.isFinite(softcap))) {
    throw new LaminaError('config_invalid', `attention kernel: softcap is ${softcap}; it must be finite and positive`);
  }
  if (windowTokens !== undefined) {
    checkRange('length of windowTokens', windowTokens.length, numLayers, numLayers, 1);
    for (const window of windowTokens) checkRange('windowTokens', window, 0, 2 ** 31 - 1, 1);
  }
  if (alibiSlopes !== undefined) {
    checkRange('length of alibiSlopes', alibiSlopes.length, numHeads, numHeads, 1);
    if (!alibiSlopes.every(Number.isFinite))
      throw new LaminaError('config_invalid', 'attention kernel: alibiSlopes must be finite');
  }
}

/** The error for memory, threads or a variant that could not be had. */
function cannotCreate(options: CreateKernelOptions, cause: unknown): LaminaError {
  const bytes = options.numBlocks * blockBytes(options.layout);
  const reason = cause instanceof Error ? cause.message : String(cause);
  return new LaminaError(
    'config_invalid',
    `attention kernel: ${options.numBlocks} KV blocks (${bytes} bytes) on ${options.numThreads} threads: ${reason}`,
    { cause },
  );
}

/**
 * Allocates numBlocks * blockBytes(layout) for KV and starts the worker threads.
 *
 * @returns The kernel, and why it is not native (null if it is).
 */
export function createKernel(options: CreateKernelOptions): {
  kernel: AttentionKernel;
  fallbackReason: string | null;
} {
  const { layout, numBlocks, numThreads, kind } = options;
  checkLayout(layout);
  // Slots are int32, and so must fit.
  checkRange('numBlocks', numBlocks, 1, Math.floor((2 ** 31 - 1) / layout.blockSizeTokens), 1);
  checkRange('numThreads', numThreads, 1, MAX_THREADS, 1);
  // Memory is committed when first written: without this check a shard would die later, in the middle of a request.
  if (numBlocks * blockBytes(layout) > totalmem()) {
    throw cannotCreate(options, new Error(`this machine has ${totalmem()} bytes; lower the KV memory`));
  }
  let fallbackReason = 'the portable kernel was asked for';
  if (kind !== 'portable') {
    const loaded = loadNativeAddon();
    if (loaded.addon !== null) {
      try {
        const kernel = new NativeKernel(loaded.addon, layout, numBlocks, numThreads, options.simd ?? '');
        return { kernel, fallbackReason: null };
      } catch (error) {
        throw cannotCreate(options, error);
      }
    }
    if (kind === 'native') {
      throw new LaminaError('config_invalid', `attention kernel: native was asked for, but ${loaded.reason}`);
    }
    fallbackReason = loaded.reason;
  }
  try {
    return { kernel: new PortableKernel(layout, numBlocks), fallbackReason };
  } catch (error) {
    throw cannotCreate(options, error);
  }
}
