"""Chinese wordings of the questions. `wordings.py` says what the names in braces stand for."""

IMAGES = {
    "none": ("这次超声检查", "本次超声检查"),
    "one": (
        "这张超声图像",
        "这幅超声图",
        "此幅声像图",
        "所附的超声切面图",
        "这帧超声画面",
    ),
    "many": (
        "这几张超声图像",
        "这组超声图",
        "所附的{n}张超声图",
        "同一次检查的{n}幅声像图",
        "这一组超声切面",
    ),
    "loop": ("这段超声动态图像", "这段超声视频", "这段动态声像图", "所附的超声动态片段"),
    "mixed": ("这组超声静态图与动态片段", "同一次检查的{n}份超声影像资料", "这些超声图像和视频"),
}

SYSTEM = (
    "你是超声科的读片助手，只写图上看得到的内容。",
    "你在超声诊断室工作，负责起草报告，由医师审签。",
    "你协助超声医师书写规范的中文报告。",
    "你熟悉乳腺、甲状腺、肝、肾、妇科、心脏和血管的超声检查。",
    "你是一位讲究措辞的超声报告撰写者，先看图，再下笔。",
    "请以超声科住院医师的身份作答，用语要规范。",
    "你的任务是阅读超声图像，并据此回答提问。",
    "你为超声科提供读片意见，不确定之处照实说明。",
    "你是受过超声诊断训练的助手，回答简明，依据图像。",
    "你擅长识别声像图上的回声、边界、形态与后方回声改变。",
    "回答时以图像为准，不臆测图上没有的征象。",
    "你正在与一位超声医师合作阅片，请用专业术语交流。",
    "你负责核对超声图像与文字是否相合。",
    "你是教学医院超声科的带教助手，表述要准确、清楚。",
    "请按超声报告的书写习惯作答。",
    "你是超声影像解读程序，输出供医师参考。",
)

REPORT = (
    "请看{images}，写出报告，先写超声所见，再写超声提示。",
    "依据{images}起草一份报告，分“超声所见”与“超声提示”两段。",
    "为{images}出一份完整的检查报告：所见一段，提示一段。",
    "阅读{images}后书写报告，要有所见，也要有结论。",
    "{images}的报告该怎么写？请把所见和提示都写出来。",
    "患者的检查做完了，见{images}，请完成书面报告的所见与提示部分。",
    "请替值班医师写好{images}的报告，格式为超声所见加超声提示。",
    "根据{images}填写报告单上的两栏：超声所见、超声提示。",
    "先客观记录{images}中的表现，再给出结论，合成一份报告。",
    "把{images}读成一份两段式的超声报告。",
    "请就{images}拟一份可供审核的报告，包含所见及提示。",
    "需要一份正式报告，材料是{images}，所见与提示缺一不可。",
    "阅片并成文：{images}，写明声像图表现和最终提示。",
    "请从{images}出发，完成整份超声报告。",
    "报告起草：观察{images}，依次写所见、提示。",
    "看完{images}，请写一份所见详实、提示扼要的报告。",
)

FINDINGS = (
    "请写出{images}的超声所见，不写结论。",
    "只需填写报告的“超声所见”一栏，依据是{images}。",
    "把{images}里的声像图表现逐一记录下来，暂不下诊断。",
    "{images}中能看到哪些结构和异常？按所见的写法记录。",
    "请按报告书写习惯，描述{images}的回声、形态与边界等表现。",
    "为{images}写所见部分，提示留给审核医师。",
    "记录{images}的客观表现即可，不用作判断。",
    "观察{images}，写一段超声所见。",
    "{images}的所见一栏应当怎样填写？",
    "请仅就图论图，把{images}所示写成所见。",
    "起草所见：材料为{images}，不含提示。",
    "从{images}中归纳声像图特征，写成报告里的所见段落。",
    "麻烦先写{images}的所见，结论稍后再定。",
    "用规范术语陈述{images}的表现，止于描述。",
)

IMPRESSION = (
    "请给出{images}的超声提示，所见从略。",
    "只写结论：{images}提示什么？",
    "看过{images}之后，请填写报告的“超声提示”一栏。",
    "{images}的诊断意见是什么？描述部分不必写。",
    "略去表现，直接写出{images}的超声提示。",
    "为{images}下一个扼要的结论。",
    "{images}应作何提示？一两句话即可。",
    "所见已由同事写好，请据{images}补上提示。",
    "请把{images}归结为报告末尾的提示。",
    "结论栏还空着，请根据{images}填上。",
    "读{images}，写提示，不写所见。",
    "综合{images}的表现，你的超声提示是？",
    "用报告结论的口吻概括{images}的意义。",
    "只要{images}的提示部分，请简明书写。",
)

CAPTION = (
    "请用几句话说明{images}的内容。",
    "{images}上有些什么？请作一段说明。",
    "给{images}配一段说明文字。",
    "请简要讲述{images}显示的部位与表现。",
    "用通顺的一段话介绍{images}。",
    "请为{images}写图注。",
    "{images}画的是什么？请描述。",
    "若要把{images}收入图谱，说明文字该怎样写？",
    "请向没有看到图的同事转述{images}。",
    "概述{images}所呈现的超声表现。",
    "请对{images}作一个整体的描述。",
    "看着{images}，说说你看到的内容。",
    "请将{images}的画面转述成文字。",
    "教学用图：请给{images}加上文字解说。",
)

DIAGNOSIS = (
    "{images}最符合哪种诊断？只答诊断名称。",
    "请用一个诊断名称概括{images}。",
    "{images}的诊断是什么？请直接写名称。",
    "判断{images}属于哪一类情况，只写类别。",
    "从{images}看，应归入什么诊断？",
    "请给{images}标注诊断标签。",
    "读{images}，写出诊断，不需要理由。",
    "{images}考虑什么？请只写诊断。",
    "一句话都不必，只写{images}的诊断名称。",
    "若只能填一个诊断，{images}应填什么？",
    "对{images}作出分类诊断。",
    "请给出与{images}相符的诊断名称。",
)

QUESTION = (
    "{question}",
    "请看{images}作答：{question}",
    "根据{images}回答：{question}",
    "问题针对{images}：{question}",
    "阅读{images}后请回答下面的问题。\n{question}",
    "以{images}为依据，{question}",
    "有一个关于{images}的问题：{question}",
    "结合{images}所示，请答：{question}",
    "{question}请依据{images}回答。",
    "提问（见{images}）：{question}",
    "请先看{images}，再答：{question}",
    "关于{images}，想请教：{question}",
)

CHOICE = (
    "下列{statement}中只有一项属于{images}，请回答它的字母。",
    "请为{images}挑出对应的{statement}，只写字母。",
    "{images}与哪一项{statement}相符？回答字母即可，不抄内容。",
    "选择题：{images}的{statement}是哪一项？请填字母。",
    "以下各项{statement}来自不同的检查，哪一项出自{images}？只答字母。",
    "对照{images}，选出正确的{statement}，用字母作答。",
    "看{images}，在备选的{statement}里选一项，仅写选项字母。",
    "给{images}配上正确的{statement}，答案只要一个字母。",
    "备选{statement}如下，请判断哪项说的是{images}，写出字母。",
    "哪个字母对应{images}的{statement}？",
    "请在各项{statement}中找到{images}的那一项，只报字母。",
    "单项选择：与{images}吻合的{statement}是？填字母。",
)

CHOICE_RESTATE = (
    "下列{statement}中只有一项属于{images}，请写出字母并抄录原文。",
    "请为{images}挑出对应的{statement}，答字母，再重写一遍该项。",
    "{images}与哪一项{statement}相符？请连同内容一并写出。",
    "选择题：{images}的{statement}是哪一项？写字母和全文。",
    "以下各项{statement}来自不同的检查，哪一项出自{images}？请把它照录下来。",
    "对照{images}，选出正确的{statement}，并原样写出。",
    "看{images}，在备选的{statement}里选一项，把字母和文字都写上。",
    "给{images}配上正确的{statement}，答案要包括选项的全部文字。",
    "备选{statement}如下，请判断哪项说的是{images}，答后附上该项原文。",
    "请在各项{statement}中找到{images}的那一项，并一字不差地重述。",
    "单项选择并重述：与{images}吻合的{statement}是？",
    "先选字母，再抄内容：哪项{statement}与{images}一致？",
)

# Statements of these two kinds go where the wording says {statement}.
STATEMENT = {
    "description": ("描述", "所见", "表现记录"),
    "conclusion": ("结论", "提示", "诊断意见"),
}
OWN_OPTIONS = (
    "{question}\n（看{images}，只答选项字母）",
    "请看{images}，从选项中选一个字母作答。\n{question}",
    "单项选择（依据{images}，填字母）：{question}",
    "就{images}选出正确的一项，只写它的字母。\n{question}",
)
OWN_OPTIONS_RESTATE = (
    "{question}\n（看{images}，写出字母和该项内容）",
    "请看{images}，选一项，并重写该项的文字。\n{question}",
    "单项选择（依据{images}，字母与内容都要写）：{question}",
    "就{images}选出正确的一项，连同文字一起抄下。\n{question}",
)
OWN_OPTIONS_WORDS = (
    "{question}\n（看{images}，直接写出所选的内容，不写字母）",
    "请看{images}，从下面几项中选一项，写出文字。\n{question}",
    "依据{images}回答，用选项里的原话：{question}",
    "就{images}作答，答案取自所列各项，不带字母。\n{question}",
)

JUDGE = (
    "下面这段{statement}说的是{images}吗？只答“是”或“否”。",
    "请核对：{images}与下列{statement}相符吗？答“是”或“否”。",
    "有人给{images}写了如下{statement}，写得对吗？对答“是”，不对答“否”。",
    "判断题：下列{statement}属于{images}。是则答“是”，不是则答“否”。",
    "对照{images}，下面的{statement}成立吗？用“是”或“否”回答。",
    "这段{statement}会不会放错了图？若确属{images}，答“是”；否则答“否”。",
    "{images}能否支持以下{statement}？请答“是”或“否”。",
    "质控核查：{images}与所附{statement}是同一次检查吗？（是/否）",
    "看{images}，再读下文，二者一致吗？一致答“是”，不一致答“否”。",
    "请判定下文是否为{images}的{statement}，只写“是”或“否”。",
    "以下{statement}与{images}对得上吗？一个字作答：是，或否。",
    "审核时要确认图文一致：{images}配这段{statement}可以吗？答“是”或“否”。",
)
