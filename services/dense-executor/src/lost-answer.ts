/**
 * Owns ending an answer that nobody can continue, because its beginning is gone, or begin, because its work item cannot be read.
 *
 * Invariants
 * 1. The end stands behind what is stored: who reads gets no token twice, and one end.
 */
import { AnswerWriter, type StoredEnd, type TokenStream } from '@lamina/bus';
import { errorBodyOf, type TokenMessage, type WorkItem } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';

/**
 * Returns whether the answer has an end; false when another process writes to it.
 * @throws LaminaError `unavailable` when the stream cannot be read, or has nothing of the answer any more.
 */
export async function endLostAnswer(
  stream: Pick<TokenStream, 'append' | 'endOf' | 'isClosed'>,
  { id, encoding, tokenIds }: WorkItem,
  error: LaminaError,
): Promise<boolean> {
  const stored = await stream.endOf(id);
  if (stored === undefined) throw new LaminaError('unavailable', 'nothing of the answer is stored any more');
  if (stored.isComplete) return true;
  const index = stored.nextIndex ?? 0;
  const writer = new AnswerWriter(stream, encoding, stored.sequence, () => undefined);
  const usage = { prompt_tokens: tokenIds.length, completion_tokens: index, total_tokens: tokenIds.length + index };
  writer.push({ ...endOf(id, stored, errorBodyOf(error)), usage });
  return writer.stored();
}

/**
 * Ends the answer to a work item that is of another version, or damaged.
 * @throws LaminaError `unavailable` when the end could not be stored.
 */
export async function endUnreadable(
  stream: Pick<TokenStream, 'append' | 'endOf' | 'isClosed'>,
  id: string,
  { code, message }: LaminaError,
): Promise<void> {
  const stored = await stream.endOf(id);
  if (stored?.isComplete === true) return;
  const writer = new AnswerWriter(stream, 'json', stored?.sequence ?? 0, () => undefined);
  const problem = `the executor cannot read what the gateway made of the prompt; are they of one version? ${message}`;
  writer.push(endOf(id, stored, { code, message: problem }));
  if (!(await writer.stored())) throw new LaminaError('unavailable', 'the end of an answer could not be stored');
}

function endOf(id: string, stored: StoredEnd | undefined, error: NonNullable<TokenMessage['error']>): TokenMessage {
  return { id, index: stored?.nextIndex ?? 0, token: null, text: '', finish_reason: 'error', error };
}
