/** Owns storing answers in tests as an executor does that knows what is stored already. */
import type { TokenStream } from '@lamina/bus';
import type { TokenMessage, WireEncoding } from '@lamina/protocol';

/** Appends one message to its answer; returns its stream sequence. */
export async function store(
  stream: TokenStream,
  tokens: readonly TokenMessage[],
  encoding: WireEncoding = 'json',
): Promise<number | undefined> {
  return stream.append(tokens, encoding, (await stream.endOf(tokens[0]!.id))?.sequence ?? 0);
}
