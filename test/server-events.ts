/** Owns reading a stream of server-sent events, as the gateway writes it: one line of data an event, and perhaps an id. */

export interface ServerEvent {
  readonly id: string | undefined;
  readonly data: string;
}

/** Events as they come; a part of one before a connection breaks is dropped. Throws when the connection breaks. */
export async function* serverEvents(response: Response): AsyncGenerator<ServerEvent> {
  let text = '';
  for await (const chunk of response.body!.pipeThrough(new TextDecoderStream())) {
    text += chunk;
    const parts = text.split('\n\n');
    text = parts.pop() ?? '';
    for (const part of parts) yield { id: /^id: (.*)$/m.exec(part)?.[1], data: /^data: (.*)$/m.exec(part)?.[1] ?? '' };
  }
}
