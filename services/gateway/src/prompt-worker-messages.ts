/** Owns what the gateway and its tokenizing threads say to each other. A prompt is sent as it is (`PromptText`). */
import type { ErrorCode } from '@lamina/tensor';
import type { ChatFormat } from './chat.ts';
import type { PromptBounds } from './prompt-encoder.ts';

export interface PromptWorkerOptions {
  readonly modelDir: string;
  /** Of the tokenizer that the gateway itself has loaded. */
  readonly digest: string;
  readonly bounds: PromptBounds;
  readonly chat: ChatFormat;
}

/** `ready` once; then one answer per prompt, in order. */
export type FromPromptWorker =
  | { readonly kind: 'ready' }
  | { readonly kind: 'encoded'; readonly tokenIds: Int32Array<ArrayBuffer> }
  | {
      readonly kind: 'refused';
      readonly code: ErrorCode;
      readonly message: string;
      readonly diagnostics: Readonly<Record<string, unknown>>;
    };
