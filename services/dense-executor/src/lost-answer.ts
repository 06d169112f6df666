/**
 * Owns ending an answer of which a part is stored that nobody can continue: its beginning is gone.
 *
 * Invariants
 * 1. The end stands behind what is stored: who reads gets no token twice, and one end.
 */
import { AnswerWriter, type TokenStream } from '@lamina/bus';
import type { WorkItem } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';

/**
 * Returns whether the answer has an end; false when another process writes to it.
 * @throws LaminaError `unavailable` when the stream cannot be read, or has nothing of the answer any more.
 */
export async function endLostAnswer(
  stream: Pick<TokenStream, 'append' | 'endOf' | 'isClosed'>,
  { id, encoding, tokenIds }: WorkItem,
  { code, message }: LaminaError,
): Promise<boolean> {
  const end = await stream.endOf(id);
  if (end === undefined) throw new LaminaError('unavailable', 'nothing of the answer is stored any more');
  if (end.isComplete) return true;
  const index = end.nextIndex ?? 0;
  const writer = new AnswerWriter(stream, encoding, end.sequence, () => undefined);
  writer.push({
    id,
    index,
    token: null,
    text: '',
    finish_reason: 'error',
    error: { code, message },
    usage: { prompt_tokens: tokenIds.length, completion_tokens: index, total_tokens: tokenIds.length + index },
  });
  return writer.stored();
}
