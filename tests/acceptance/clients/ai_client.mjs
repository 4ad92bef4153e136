// The AI SDK: generateText with a tool, generateObject, streamObject and streamText. Arguments: the URL, the model.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "isthmus", baseURL: process.argv[2] + "/v1", supportsStructuredOutputs: true,
});
const model = provider(process.argv[3]);
const schema = z.object({ capital: z.boolean(), population: z.number().int().min(0).max(99999999) });
const weather = tool({ description: "Weather of a city", inputSchema: z.object({ city: z.string().max(20) }) });
const asked = { model, temperature: 0, maxRetries: 0 };

const { object } = await generateObject({ ...asked, schema, prompt: "Describe Paris." });
const partial = streamObject({ ...asked, schema, prompt: "Describe Paris." });
for await (const _ of partial.partialObjectStream);
const called = await generateText({
  ...asked, tools: { weather }, toolChoice: "required", prompt: "What is the weather in Paris?",
});
const stream = streamText({
  ...asked, tools: { weather }, toolChoice: "required", prompt: "What is the weather in Paris?",
});
const calls = await stream.toolCalls;
const text = await generateText({ ...asked, prompt: "Name a river.", maxOutputTokens: 8 });
console.log(JSON.stringify({
  object, streamed_object: await partial.object, text: text.text,
  call: [called.toolCalls[0].toolName, called.toolCalls[0].input, called.finishReason],
  streamed_call: [calls[0].toolName, calls[0].input],
}));
