/**
 * Owns turning the text of a request into token ids: chat template, length in bytes, tokenizer.
 *
 * Invariants
 * 1. Pure and synchronous. The event loop and the worker threads run this same code on the same files, so a prompt has
 *    the same tokens and the same error wherever it is tokenized.
 * 2. Text that cannot fit the context is refused before it is tokenized.
 */
import type { Tokenizer } from '@lamina/model';
import type { GenerateRequest } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import type { RenderChat } from './chat.ts';

export type PromptText = { readonly text: string } | { readonly messages: NonNullable<GenerateRequest['messages']> };

export interface PromptBounds {
  /** Tokens. */
  readonly contextLength: number;
  /** Bytes of the longest token. */
  readonly maxTokenBytes: number;
}

/** @throws LaminaError `invalid_request`, `context_length_exceeded` */
export type EncodePrompt = (prompt: PromptText) => number[];

/** Special tokens are written longer than any other; this covers them. */
const MIN_TOKEN_BYTES_BOUND = 64;
/** What the chat template costs per message, in characters of tokenized text: some 27 us (prompt-tokenizer-bench.mjs). */
const MESSAGE_CHARACTERS = 32;

export function createPromptEncoder(
  bounds: PromptBounds,
  renderChat: RenderChat,
  tokenizer: Pick<Tokenizer, 'encode'>,
): EncodePrompt {
  return (prompt) => {
    const isChat = 'messages' in prompt;
    const text = isChat ? renderChat(prompt.messages) : prompt.text;
    if (text === '')
      throw new LaminaError('invalid_request', 'messages: the chat template made an empty prompt of them');
    requireBytesFit(text, bounds);
    const tokenIds = tokenizer.encode(text, { addSpecialTokens: !isChat });
    requireTokensFit(tokenIds.length, bounds);
    return tokenIds;
  };
}

/** How much work a prompt is, in characters of text. */
export function charactersOf(prompt: PromptText): number {
  if ('text' in prompt) return prompt.text.length;
  return prompt.messages.reduce((sum, { content }) => sum + content.length + MESSAGE_CHARACTERS, 0);
}

/** @throws LaminaError `context_length_exceeded` */
export function requireBytesFit(text: string, { contextLength, maxTokenBytes }: PromptBounds): void {
  const bytes = Buffer.byteLength(text);
  if (bytes <= contextLength * Math.max(maxTokenBytes, MIN_TOKEN_BYTES_BOUND)) return;
  throw new LaminaError(
    'context_length_exceeded',
    `the prompt has ${bytes} bytes; that cannot fit the context of ${contextLength} tokens`,
  );
}

/** @throws LaminaError `context_length_exceeded` */
export function requireTokensFit(promptTokens: number, { contextLength }: Pick<PromptBounds, 'contextLength'>): void {
  if (promptTokens < contextLength) return;
  throw new LaminaError(
    'context_length_exceeded',
    `the prompt has ${promptTokens} tokens; the context of ${contextLength} leaves no room for an answer`,
  );
}
