/**
 * Owns the last messages that a gateway writes itself: of a request that was cancelled, refused, or is past its deadline.
 */
import { errorBodyOf, type TokenMessage } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';

/** How far an answer came. */
export interface AnswerExtent {
  readonly promptTokens: number;
  readonly completionTokens: number;
}

/** The end of a request that was cancelled. */
export function cancelledEnd(id: string, { promptTokens, completionTokens }: AnswerExtent): TokenMessage {
  const total = promptTokens + completionTokens;
  const usage = { prompt_tokens: promptTokens, completion_tokens: completionTokens, total_tokens: total };
  return { id, index: completionTokens, token: null, text: '', finish_reason: 'cancelled', usage };
}

/** The end of a request that failed after `completionTokens` tokens. */
export function failedEnd(id: string, completionTokens: number, error: LaminaError): TokenMessage {
  return { id, index: completionTokens, token: null, text: '', finish_reason: 'error', error: errorBodyOf(error) };
}

export function deadlineExceeded(): LaminaError {
  return new LaminaError('deadline_exceeded', 'deadline_ms passed before the answer was complete');
}
