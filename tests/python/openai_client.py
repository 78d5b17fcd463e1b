"""The unmodified `openai` package against the gateway: python openai_client.py BASE_URL CHAT_MODEL EMBEDDING_MODEL"""

import sys

import openai


def main() -> None:
    base_url, chat, embedding = sys.argv[1:4]
    client = openai.OpenAI(base_url=base_url, api_key="unused-on-loopback", max_retries=0, timeout=60)

    models = {model.id for model in client.models.list()}
    assert {chat, embedding} <= models, models

    messages = [{"role": "user", "content": "Say something."}]
    whole = client.chat.completions.create(model=chat, messages=messages, max_tokens=24, temperature=0, seed=1)
    assert whole.choices[0].message.content, whole
    assert whole.usage.completion_tokens == 24, whole.usage

    pieces, usage = [], None
    stream = client.chat.completions.create(
        model=chat, messages=messages, max_tokens=24, temperature=0, seed=1, stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
        usage = chunk.usage or usage
    assert len(pieces) > 1, "the stream came in one piece"
    assert "".join(pieces) == whole.choices[0].message.content, (pieces, whole.choices[0].message.content)
    assert usage.completion_tokens == 24, usage

    text = client.completions.create(model=chat, prompt="Once", max_tokens=8, temperature=0)
    assert text.choices[0].text, text

    vectors = client.embeddings.create(model=embedding, input=["one", "two"], encoding_format="float")
    assert len(vectors.data) == 2 and len(vectors.data[0].embedding) > 8, vectors

    try:
        client.chat.completions.create(model="absent", messages=messages)
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error
        assert chat in str(error), error
    else:
        raise AssertionError("an unknown model was answered")
    print("openai: models, chat, stream of", len(pieces), "pieces, completion, embeddings, unknown model")


main()
